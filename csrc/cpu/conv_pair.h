// Two vectors of neighbours: loaded, computed with and stored together. Where they come from bfloat16 they are the
// elements of even and of odd place, as the upper half of a float32 is a bfloat16.
#pragma once

#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

// Asks for x's cache line, which is to be read soon. Any address may be asked for.
inline void prefetch(const void* x) { __builtin_prefetch(x); }

template <class T>
struct Pair {
  static constexpr int64_t kSize = 2 * Vec::W;
  Vec a, b;

  // Numbers of two groups, each of half the elements.
  static Pair halves(const float* d) { return {set1(d[0]), set1(d[1])}; }
  static Pair load(const T* p) { return {dflash::DFLASH_ISA::load(p), dflash::DFLASH_ISA::load(p + Vec::W)}; }
  void store(T* p) const {
    dflash::DFLASH_ISA::store(p, a);
    dflash::DFLASH_ISA::store(p + Vec::W, b);
  }
};

#if DFLASH_VEC == 512
template <>
struct Pair<bf16> {
  static constexpr int64_t kSize = 32;
  Vec a, b;

  static Pair halves(const float* d) {
    const __m512 both = _mm512_mask_broadcastss_ps(_mm512_set1_ps(d[0]), 0xff00, _mm_load_ss(d + 1));
    return {{both}, {both}};
  }
  static Pair load(const bf16* p) {
    const __m512i u = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000))))}};
  }
  void store(bf16* p) const {
    __m512i even = rounded(a.v), odd = rounded(b.v);
    if (_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)) even = quiet(a.v, even), odd = quiet(b.v, odd);
    const __m512i low = _mm512_srli_epi32(even, 16), high = _mm512_and_si512(odd, _mm512_set1_epi32(int(0xffff0000)));
    _mm512_storeu_si512(p, _mm512_or_si512(low, high));
  }

 private:
  // The upper half is the bfloat16 of a number that is not NaN.
  static __m512i rounded(__m512 x) {
    const __m512i u = _mm512_castps_si512(x), r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(r, _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), r, _mm512_set1_epi32(1));
  }
  static __m512i quiet(__m512 x, __m512i r) {
    return _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_castps_si512(x),
                                _mm512_set1_epi32(0x400000));
  }
};
#elif DFLASH_VEC == 256
template <>
struct Pair<bf16> {
  static constexpr int64_t kSize = 16;
  Vec a, b;

  static Pair halves(const float* d) {
    const __m256 both = _mm256_blend_ps(_mm256_set1_ps(d[0]), _mm256_set1_ps(d[1]), 0xf0);
    return {{both}, {both}};
  }
  static Pair load(const bf16* p) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(u, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000))))}};
  }
  void store(bf16* p) const {
    const __m256i low = _mm256_srli_epi32(rounded(a.v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, rounded(b.v), 0xaa));
  }

 private:
  static __m256i rounded(__m256 x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(r), _mm256_castsi256_ps(quiet),
                                                _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
};
#endif

template <class T>
inline Pair<T> fma(Pair<T> x, Pair<T> y, Pair<T> z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }

}  // namespace
}  // namespace dflash::DFLASH_ISA
