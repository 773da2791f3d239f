// float8_e4m3fn (fp8) to and from float32. Widening is exact. Narrowing is to nearest, ties to even; what is beyond 448
// becomes 448 with its sign, NaN becomes 0x7f. Integer arithmetic, because few processors have instructions for it, and
// because one that flushes subnormals would flush what is one in float32.
#pragma once

#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kRebias = (127 - 7) << 3;          // float32's exponent bias less fp8's, where fp8 has its exponent
constexpr uint32_t kLargest = 0x43e00000;        // 448
constexpr uint32_t kSmallestNormal = 0x3c800000;  // 2^-6
constexpr uint32_t kSubnormals = 0x46800000;     // 2^14: what is added to it rounds to multiples of 2^-9

#if DFLASH_VEC == 512
inline Vec widened(__m512i x) {
  const auto all = [](uint32_t u) { return _mm512_set1_epi32(int(u)); };
  const __m512i magnitude = _mm512_and_si512(x, all(0x7f)), sign = _mm512_slli_epi32(_mm512_srli_epi32(x, 7), 31);
  __m512i r = _mm512_slli_epi32(_mm512_add_epi32(magnitude, all(kRebias)), 20);
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
  r = _mm512_mask_mov_epi32(r, _mm512_cmplt_epi32_mask(magnitude, all(8)), _mm512_castps_si512(small));
  r = _mm512_mask_mov_epi32(r, _mm512_cmpeq_epi32_mask(magnitude, all(0x7f)), all(0x7fc00000));
  return {_mm512_castsi512_ps(_mm512_or_si512(r, sign))};
}
inline Vec load_n(const fp8* p, int n) { return widened(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes_mask(n), p))); }
inline void store_n(fp8* p, Vec x, int n) {
  const auto all = [](uint32_t u) { return _mm512_set1_epi32(int(u)); };
  const __m512i u = _mm512_castps_si512(x.v), magnitude = _mm512_and_si512(u, all(0x7fffffff));
  const __m512i a = _mm512_min_epu32(magnitude, all(kLargest));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(a, 20), all(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(a, _mm512_add_epi32(odd, all(0x7ffff))), 20);
  r = _mm512_sub_epi32(r, all(kRebias));
  const __m512 small = _mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(all(kSubnormals)));
  r = _mm512_mask_sub_epi32(r, _mm512_cmplt_epu32_mask(a, all(kSmallestNormal)), _mm512_castps_si512(small),
                            all(kSubnormals));
  r = _mm512_or_si512(r, _mm512_slli_epi32(_mm512_srli_epi32(u, 31), 7));
  r = _mm512_mask_mov_epi32(r, _mm512_cmpgt_epu32_mask(magnitude, all(0x7f800000)), all(0x7f));
  _mm_mask_storeu_epi8(p, lanes_mask(n), _mm512_cvtepi32_epi8(r));
}
#elif DFLASH_VEC == 256
inline Vec load_n(const fp8* p, int n) {
  uint8_t bytes[8] = {};
  std::memcpy(bytes, p, n >= 8 ? 8 : size_t(n > 0 ? n : 0));
  const auto all = [](uint32_t u) { return _mm256_set1_epi32(int(u)); };
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m256i magnitude = _mm256_and_si256(x, all(0x7f)), sign = _mm256_slli_epi32(_mm256_srli_epi32(x, 7), 31);
  __m256i r = _mm256_slli_epi32(_mm256_add_epi32(magnitude, all(kRebias)), 20);
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
  r = _mm256_blendv_epi8(r, _mm256_castps_si256(small), _mm256_cmpgt_epi32(all(8), magnitude));
  r = _mm256_blendv_epi8(r, all(0x7fc00000), _mm256_cmpeq_epi32(magnitude, all(0x7f)));
  return {_mm256_castsi256_ps(_mm256_or_si256(r, sign))};
}
inline void store_n(fp8* p, Vec x, int n) {
  const auto all = [](uint32_t u) { return _mm256_set1_epi32(int(u)); };
  const __m256i u = _mm256_castps_si256(x.v), magnitude = _mm256_and_si256(u, all(0x7fffffff));
  const __m256i a = _mm256_min_epu32(magnitude, all(kLargest));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(a, 20), all(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(a, _mm256_add_epi32(odd, all(0x7ffff))), 20);
  r = _mm256_sub_epi32(r, all(kRebias));
  const __m256 small = _mm256_add_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(all(kSubnormals)));
  r = _mm256_blendv_epi8(r, _mm256_sub_epi32(_mm256_castps_si256(small), all(kSubnormals)),
                         _mm256_cmpgt_epi32(all(kSmallestNormal), a));
  r = _mm256_or_si256(r, _mm256_slli_epi32(_mm256_srli_epi32(u, 31), 7));
  r = _mm256_blendv_epi8(r, all(0x7f), _mm256_cmpgt_epi32(magnitude, all(0x7f800000)));
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), r);
  for (int i = 0; i < 8 && i < n; ++i) p[i].bits = uint8_t(lanes[i]);
}
#else
inline float to_float(fp8 x) {
  const uint32_t magnitude = x.bits & 0x7f, sign = uint32_t(x.bits & 0x80) << 24;
  if (magnitude == 0x7f) return bits_to_float(sign | 0x7fc00000);
  if (magnitude < 8) return bits_to_float(float_to_bits(float(magnitude) * 0x1p-9f) | sign);
  return bits_to_float(sign | ((magnitude + kRebias) << 20));
}

inline fp8 to_fp8(float x) {
  const uint32_t u = float_to_bits(x), sign = (u >> 24) & 0x80, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return fp8{0x7f};
  const uint32_t a = magnitude < kLargest ? magnitude : kLargest;
  if (a < kSmallestNormal)
    return fp8{uint8_t(sign | (float_to_bits(bits_to_float(a) + bits_to_float(kSubnormals)) - kSubnormals))};
  return fp8{uint8_t(sign | (((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - kRebias))};
}

inline Vec load_n(const fp8* p, int n) {
  return each([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
inline void store_n(fp8* p, Vec x, int n) {
  for (int i = 0; i < 8 && i < n; ++i) p[i] = to_fp8(x.v[i]);
}
#endif

// A row of a cache as T, which has room for every fp8 value.
template <class T>
inline void widen_row(const fp8* from, T* to, int n) {
  for (int i = 0; i < n; i += Vec::W) store_n(to + i, load_n(from + i, n - i), n - i);
}

// A row of T as a cache with this scale has it. nullptr: 1.
template <class T>
inline void quantise_row(const T* from, fp8* to, int64_t n, const float* scale) {
  const Vec divisor = set1(scale ? *scale : 1.0f);
  for (int64_t i = 0; i < n; i += Vec::W) {
    const Vec x = load_n(from + i, int(n - i));
    store_n(to + i, scale ? x / divisor : x, int(n - i));
  }
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
