// One float32 vector type per instruction set, with loads and stores that convert from and to bf16 and f16.
//
// Everything is in an anonymous namespace inside the set's own namespace (see isa.h). Rounding to bf16 and f16 is to
// nearest, ties to even. Reductions add lanes in one fixed order. A partial load fills missing lanes with zero.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/types.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define DFLASH_VEC 512
#elif defined(__AVX2__)
#include <immintrin.h>
#define DFLASH_VEC 256
#else
#define DFLASH_VEC 0
#endif

namespace dflash::DFLASH_ISA {
namespace {

inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

// ---- scalars -------------------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
#if DFLASH_VEC
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exp = (x.bits >> 10) & 31, man = x.bits & 0x3ff;
  if (exp == 31) return bits_to_float(sign | 0x7f800000 | (man << 13) | (man ? 0x400000 : 0));
  if (exp == 0) return (sign ? -1.0f : 1.0f) * float(man) * 5.9604644775390625e-8f;  // 2^-24
  return bits_to_float(sign | ((exp + 112) << 23) | (man << 13));
#endif
}

template <class T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return bf16{uint16_t((u >> 16) | 0x40)};
  return bf16{uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
#if DFLASH_VEC
  return f16{uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return f16{uint16_t(sign | 0x7e00 | ((a >> 13) & 0x3ff))};
  if (a >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};
  if (a < 0x38800000) {  // subnormal: let the float adder round
    const float r = bits_to_float(a) + 0.5f;
    return f16{uint16_t(sign | (float_to_bits(r) - 0x3f000000))};
  }
  const uint32_t r = a - 0x38000000;
  return f16{uint16_t(sign | ((r + 0xfff + ((r >> 13) & 1)) >> 13))};
#endif
}

inline bool is_nan(float x) { return x != x; }

// ---- vectors -------------------------------------------------------------------------------------------------------

#if DFLASH_VEC == 512

struct Vec {
  static constexpr int W = 16;
  __m512 v;
};
inline __mmask16 lanes_mask(int n) { return __mmask16(n >= 16 ? 0xffff : (1u << n) - 1); }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_mask(n), p)}; }
inline Vec load_n(const bf16* p, int n) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_mask(n), p)), 16))};
}
inline Vec load_n(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_mask(n), p))}; }
inline __m256i round_bf16(__m512 x) {
  const __m512i u = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  __m512i r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  r = _mm512_mask_add_epi32(r, _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), r, one);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, round_bf16(x.v)); }
inline void store(f16* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// A whole vector is stored without a mask: with one, Zen 4 takes a dozen cycles for it.
inline void store_n(float* p, Vec x, int n) {
  if (n >= 16) return store(p, x);
  _mm512_mask_storeu_ps(p, lanes_mask(n), x.v);
}
inline void store_n(bf16* p, Vec x, int n) {
  if (n >= 16) return store(p, x);
  _mm256_mask_storeu_epi16(p, lanes_mask(n), round_bf16(x.v));
}
inline void store_n(f16* p, Vec x, int n) {
  if (n >= 16) return store(p, x);
  _mm256_mask_storeu_epi16(p, lanes_mask(n), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round_int(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for integral n in [-126, 127]
inline Vec scale_pow2(Vec a, Vec n) {
  const __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(e))};
}
// lane-wise x < y ? a : b, and x is NaN ? a : b
inline Vec select_lt(Vec x, Vec y, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
inline Vec select_nan(Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), b.v, a.v)};
}
inline bool any_at_least(Vec x, Vec y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ) != 0; }

#elif DFLASH_VEC == 256

struct Vec {
  static constexpr int W = 8;
  __m256 v;
};
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
inline Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
template <class T> inline Vec load_n(const T* p, int n) {
  if (n >= 8) return load(p);
  T buffer[8] = {};
  std::memcpy(buffer, p, sizeof(T) * (n > 0 ? n : 0));
  return load(buffer);
}
inline __m128i round_bf16(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i y = _mm256_blendv_epi8(r, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm_storeu_si128((__m128i*)p, round_bf16(x.v)); }
inline void store(f16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <class T> inline void store_n(T* p, Vec x, int n) {
  if (n >= 8) return store(p, x);
  T buffer[8];
  store(buffer, x);
  std::memcpy(p, buffer, sizeof(T) * (n > 0 ? n : 0));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec vmax(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec vmin(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round_int(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_pow2(Vec a, Vec n) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
}
inline Vec select_lt(Vec x, Vec y, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
inline Vec select_nan(Vec x, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
}
inline bool any_at_least(Vec x, Vec y) { return _mm256_movemask_ps(_mm256_cmp_ps(x.v, y.v, _CMP_GE_OQ)) != 0; }

#else

struct Vec {
  static constexpr int W = 8;
  float v[8];
};
template <class F> inline Vec each(F f) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.v[i] = f(i);
  return r;
}
inline Vec set1(float x) { return each([&](int) { return x; }); }
template <class T> inline Vec load(const T* p) { return each([&](int i) { return to_float(p[i]); }); }
template <class T> inline Vec load_n(const T* p, int n) {
  return each([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <class T> inline void store(T* p, Vec x) {
  for (int i = 0; i < 8; ++i) p[i] = from_float<T>(x.v[i]);
}
template <class T> inline void store_n(T* p, Vec x, int n) {
  for (int i = 0; i < 8 && i < n; ++i) p[i] = from_float<T>(x.v[i]);
}
inline Vec operator+(Vec a, Vec b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Vec vmax(Vec a, Vec b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec vmin(Vec a, Vec b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec round_int(Vec a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
inline Vec scale_pow2(Vec a, Vec n) {
  return each([&](int i) { return a.v[i] * bits_to_float(uint32_t(int(n.v[i]) + 127) << 23); });
}
inline Vec select_lt(Vec x, Vec y, Vec a, Vec b) {
  return each([&](int i) { return x.v[i] < y.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec select_nan(Vec x, Vec a, Vec b) { return each([&](int i) { return is_nan(x.v[i]) ? a.v[i] : b.v[i]; }); }
inline bool any_at_least(Vec x, Vec y) {
  for (int i = 0; i < 8; ++i)
    if (x.v[i] >= y.v[i]) return true;
  return false;
}

#endif

// Lanes are halved: (0+W/2), (1+W/2+1), ...; then again. The order is the same for every row and every length.
template <class F>
inline float halved(Vec x, F f) {
#if DFLASH_VEC
#if DFLASH_VEC == 512
  const __m256 w = f(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
  const __m256 w = x.v;
#endif
  __m128 h = f(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
  h = f(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(f(h, _mm_movehdup_ps(h)));
#else
  for (int n = Vec::W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x.v[i] = f(x.v[i], x.v[i + n]);
  return x.v[0];
#endif
}
#if DFLASH_VEC
struct Add {
  __m128 operator()(__m128 a, __m128 b) const { return _mm_add_ps(a, b); }
  __m256 operator()(__m256 a, __m256 b) const { return _mm256_add_ps(a, b); }
};
struct Larger {
  __m128 operator()(__m128 a, __m128 b) const { return _mm_max_ps(a, b); }
  __m256 operator()(__m256 a, __m256 b) const { return _mm256_max_ps(a, b); }
};
#else
struct Add {
  float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  float operator()(float a, float b) const { return a > b ? a : b; }
};
#endif
inline float reduce_add(Vec x) { return halved(x, Add{}); }
// Where a lane is NaN it may be anything.
inline float reduce_max(Vec x) { return halved(x, Larger{}); }

// x as it would be read back after being stored as T.
template <class T>
inline Vec rounded(Vec x) {
  T r[Vec::W];
  store(r, x);
  return load(r);
}
template <>
inline Vec rounded<float>(Vec x) { return x; }

constexpr float kLowestExp = -87.33654f;

// exp(x) for x in [kLowestExp, 88.72]: Cephes' degree-5 polynomial after Cody-Waite reduction; about 1 ulp.
inline Vec exp_within(Vec x) {
  Vec n = round_int(x * set1(1.44269504f));
  n = vmin(n, set1(127.0f));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  return scale_pow2(p, n);
}

// exp(-inf) and anything that would be subnormal is exactly 0, exp of a large x is inf, NaN stays NaN.
inline Vec vexp(Vec x) {
  const Vec lo = set1(kLowestExp), hi = set1(88.72283f);
  Vec y = exp_within(vmin(vmax(x, lo), hi));
  y = select_lt(x, lo, set1(0.0f), y);
  y = select_lt(hi, x, set1(INFINITY), y);
  return select_nan(x, x, y);
}

// exp(x) for x <= 0, in fewer steps: within 3 ulp where x > -1, within 3 |x| ulp below that; 2^-126 from -87.4 on and
// for -inf. NaN stays NaN.
inline Vec vexp_below(Vec x) {
  const Vec t = vmax(set1(-126.0f), x * set1(1.44269504f));  // a maximum with NaN is its second operand
  const Vec n = round_int(t), r = t - n;
  Vec p = set1(1.3264727e-3f);
  p = fma(p, r, set1(9.6715128e-3f));
  p = fma(p, r, set1(5.5507337e-2f));
  p = fma(p, r, set1(2.4022242e-1f));
  p = fma(p, r, set1(6.9314698e-1f));
  p = fma(p, r, set1(1.0f));
#if DFLASH_VEC == 512
  return {_mm512_scalef_ps(p.v, n.v)};
#else
  return scale_pow2(p, select_nan(x, set1(0.0f), n));
#endif
}

// exp(x) for x that is not positive; 0 for NaN.
inline Vec vexp_negative(Vec x) {
  const Vec lo = set1(kLowestExp);
  return select_lt(lo, x, exp_within(vmax(x, lo)), set1(0.0f));
}

// tanh(x): Cephes' polynomial below 0.625, 1 - 2 / (exp(2|x|) + 1) above.
inline Vec vtanh(Vec x) {
  const Vec zero = set1(0.0f), z = x * x, a = vmax(x, zero - x);
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  const Vec big = set1(1.0f) - set1(2.0f) / (vexp(a + a) + set1(1.0f));
  const Vec y = select_lt(a, set1(0.625f), small, select_lt(x, zero, zero - big, big));
  return select_nan(x, x, y);
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
