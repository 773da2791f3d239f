// Rounds rows of x to int8, a piece at a time, with a power of two as its scale.
#pragma once

#include "cpu/memory.h"
#include "cpu/quant_codes.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kLowest = -100, kHighest = 100;  // exponents e
constexpr int kHalfPiece = int(kPiece) / 2;

#if DFLASH_VEC == 512
// The upper half of the largest magnitude's bits.
inline uint32_t largest(__m256i upper) {
  const __m128i most = _mm_max_epu16(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  return 0xffff & ~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi32(-1))));
}
inline uint32_t top_of(const bf16* x) {
  const __m512i m = _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi16(0x7fff));
  return largest(_mm256_max_epu16(_mm512_castsi512_si256(m), _mm512_extracti64x4_epi64(m, 1)));
}
template <class T>
inline uint32_t top_of(const T* x) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i a = _mm512_and_si512(_mm512_castps_si512(load(x).v), magnitude),
                b = _mm512_and_si512(_mm512_castps_si512(load(x + kHalfPiece).v), magnitude);
  return largest(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_max_epu32(a, b), 16)));
}

// Rounds half a piece times `inverse`, and returns the sum.
template <class T>
inline int32_t round_half(const T* x, float inverse, int8_t* to) {
  const __m128i q = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((load(x) * set1(inverse)).v));
  _mm_store_si128((__m128i*)to, q);
  const __m128i sums = _mm_sad_epu8(_mm_xor_si128(q, _mm_set1_epi8(char(0x80))), _mm_setzero_si128());
  return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - 128 * kHalfPiece;
}
#else
template <class T>
inline uint32_t top_of(const T* x) {
  uint32_t top = 0;
  for (int i = 0; i < kPiece; ++i) {
    const uint32_t bits = float_to_bits(to_float(x[i])) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  return top >> 16;
}
template <class T>
inline int32_t round_half(const T* x, float inverse, int8_t* to) {
  int32_t sum = 0;
  for (int i = 0; i < kHalfPiece; ++i) {
    const int32_t q = int32_t(std::nearbyint(to_float(x[i]) * inverse));
    to[i] = int8_t(q);
    sum += q;
  }
  return sum;
}
#endif

template <class T>
inline void round_piece(const T* x, int offset, int halves, RowPiece& to) {
  // The largest magnitude becomes 64 to 127: the next power of two where 127.5 would be reached.
  int e = int((top_of(x) + 1) >> 7) - 127 - 6;
  if (e > kHighest) {
    std::memset(&to, 0, sizeof(to));
    to.init[0] = to.init[1] = 0x7fc00000;
    return;
  }
  e = e < kLowest ? kLowest : e;
  const float inverse = bits_to_float(uint32_t(127 - e) << 23);
  const int32_t base = 0x4b400000 + e * (1 << 23);
  const int32_t first = round_half(x, inverse, to.q);
  const int32_t second = round_half(x + kHalfPiece, inverse, to.q + kHalfPiece);
  to.init[0] = base - offset * (halves == 2 ? first : first + second);
  to.init[1] = base - offset * second;
  to.base = bits_to_float(uint32_t(base));
  to.sum = bits_to_float(uint32_t(127 + e) << 23) * float(first + second);
}

template <class T>
void round_rows(const QuantRows& p) {
  const int offset = kSignedCodes && p.format == Format::q8_0 ? 0 : layout_of(p.format).offset;
  const int halves = p.format == Format::q6_k ? 2 : 1;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t b = 0; b < p.pieces; ++b)
      round_piece(static_cast<const T*>(p.x.data) + r * p.x.stride + b * kPiece, offset, halves,
                  p.out[b * p.rows + r]);
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
