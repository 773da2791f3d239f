// Integer sums of R rows over a piece, or half of one: a flavour per instruction set, all with the same integers.
#pragma once

#include "cpu/memory.h"
#include "cpu/quant_codes.h"

namespace dflash::DFLASH_ISA {
namespace {

inline int32_t four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return four;
}

// Four bytes of x beside the codes of every output.
#if DFLASH_VEC == 512
inline Codes of_four(int32_t x) { return _mm512_set1_epi32(x); }
#elif DFLASH_VEC == 256
inline Codes of_four(int32_t x) { return _mm256_set1_epi32(x); }
#else
[[maybe_unused]] inline Codes of_four(int32_t x) {
  Codes c;
  for (int j = 0; j < Vec::W; ++j) std::memcpy(c.v + 4 * j, &x, 4);
  return c;
}
#endif

#if DFLASH_VNNI && DFLASH_VEC == 512
template <Format F, int R>
struct IntSums {
  __m512i v[R];
  // Not the intrinsic: the compiler would load x into a register of its own, which takes an instruction more.
  template <int AT> DFLASH_INLINE void add(int r, Codes codes, const int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(v[r]) : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(x)));
  }
  template <int AT> DFLASH_INLINE void add(int r, Codes codes, Codes x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(v[r]) : "v"(codes), "v"(x));
  }
  DFLASH_INLINE void start(int r, int32_t init) { v[r] = of_four(init); }
  DFLASH_INLINE Vec finish(int r) const { return {_mm512_castsi512_ps(v[r])}; }
};
#elif DFLASH_VNNI
template <Format F, int R>
struct IntSums {
  __m256i v[R];
  template <int AT> DFLASH_INLINE void add(int r, Codes codes, const int8_t* x) {
    add<AT>(r, codes, of_four(four(x)));
  }
  template <int AT> DFLASH_INLINE void add(int r, Codes codes, Codes x) {
    // Not the intrinsic: with it the compiler copies sums about.
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(v[r]) : "x"(codes), "x"(x));
  }
  DFLASH_INLINE void start(int r, int32_t init) { v[r] = of_four(init); }
  DFLASH_INLINE Vec finish(int r) const { return {_mm256_castsi256_ps(v[r])}; }
};
#elif DFLASH_VEC
// Without VNNI: products of bytes are added in pairs to 16 bits, FOLD registers of them before they no longer fit. With
// codes of 8 bits one pair does not fit, unless the code's sign goes to x.
template <Format F> constexpr int kFold = kEightBits<F> ? 1 : F == Format::q6_k ? 2 : kFiveBits<F> ? 4 : 8;
#if DFLASH_VEC == 512
inline __m512i zero_bits() { return _mm512_setzero_si512(); }
inline __m512i pair_products(__m512i codes, __m512i x) { return _mm512_maddubs_epi16(codes, x); }
inline __m512i add16(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }
inline __m512i fold16(__m512i sum, __m512i pairs) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
inline __m512i signed_products(__m512i codes, __m512i x) {
  const __m512i w = _mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80)));
  return _mm512_maddubs_epi16(_mm512_abs_epi8(w), _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), zero_bits(), x));
}
inline Vec as_floats(__m512i x) { return {_mm512_castsi512_ps(x)}; }
#else
inline __m256i zero_bits() { return _mm256_setzero_si256(); }
inline __m256i pair_products(__m256i codes, __m256i x) { return _mm256_maddubs_epi16(codes, x); }
inline __m256i add16(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
inline __m256i fold16(__m256i sum, __m256i pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline __m256i signed_products(__m256i codes, __m256i x) {
  const __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8(char(0x80)));
  return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
inline Vec as_floats(__m256i x) { return {_mm256_castsi256_ps(x)}; }
#endif
template <Format F, int R>
struct IntSums {
  Codes sum[R], pairs[R];
  template <int AT> DFLASH_INLINE void add(int r, Codes codes, const int8_t* x) {
    add<AT>(r, codes, of_four(four(x)));
  }
  template <int AT> DFLASH_INLINE void add(int r, Codes codes, Codes x) {
    const Codes found = kEightBits<F> ? signed_products(codes, x) : pair_products(codes, x);
    pairs[r] = AT % kFold<F> ? add16(pairs[r], found) : found;
    asm("" : "+v"(pairs[r]));  // one addition after another: as a tree they would fill the registers
    if constexpr (AT % kFold<F> == kFold<F> - 1) {
      sum[r] = fold16(sum[r], pairs[r]);
      asm("" : "+v"(sum[r]));
    }
  }
  DFLASH_INLINE void start(int r, int32_t init) { sum[r] = of_four(init); }
  DFLASH_INLINE Vec finish(int r) const { return as_floats(sum[r]); }
};
#else
template <Format F, int R>
struct IntSums {
  int32_t v[R][Vec::W];
  template <int AT> void add(int r, const Codes& codes, const int8_t* x) {
    for (int j = 0; j < Vec::W; ++j)
      for (int i = 0; i < 4; ++i) v[r][j] += codes.v[4 * j + i] * x[i];
  }
  void start(int r, int32_t init) { for (int32_t& sum : v[r]) sum = init; }
  Vec finish(int r) const { return each([&](int j) { return bits_to_float(uint32_t(v[r][j])); }); }
};
#endif

}  // namespace
}  // namespace dflash::DFLASH_ISA
