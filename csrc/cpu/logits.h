// What every epilogue of the head does to the product's sums before it compares them.
#pragma once

#include "cpu/lm_head.h"
#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int64_t kNoId = INT64_MAX;

// The logits of m <= Vec::W outputs from n on, before they are rounded to T; what lies past them is not theirs.
template <class T>
inline Vec finish_logits(const LogitParams& p, Vec y, int64_t n, int m) {
  if (p.gemm.scales) y = y * load_n(p.gemm.scales + n, m);
  if (p.gemm.bias) y = y + load_n(static_cast<const T*>(p.gemm.bias) + n, m);
  if (p.scale != 1.0f) y = y * set1(p.scale);
  if (p.softcap > 0.0f) y = vtanh(y / set1(p.softcap)) * set1(p.softcap);
  return y;
}

inline bool any_not_less(Vec v, float best) {
#if DFLASH_VEC == 512
  return _mm512_cmp_ps_mask(v.v, _mm512_set1_ps(best), _CMP_NLT_UQ) != 0;
#elif DFLASH_VEC == 256
  return _mm256_movemask_ps(_mm256_cmp_ps(v.v, _mm256_set1_ps(best), _CMP_NLT_UQ)) != 0;
#else
  for (int i = 0; i < Vec::W; ++i)
    if (!(v.v[i] < best)) return true;
  return false;
#endif
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
