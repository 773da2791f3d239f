// Codes and scales of a packed record (quant.h) in registers: V vectors of outputs, R a register of four k.
#pragma once

#include "cpu/gemm_micro.h"
#include "cpu/quant.h"

namespace dflash::DFLASH_ISA {
namespace {

// ---- bytes ---------------------------------------------------------------------------------------------------------

#if DFLASH_VEC == 512
using Codes = __m512i;
inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes both(Codes a, Codes b) { return _mm512_or_si512(a, b); }
// Every byte shifted right by RIGHT, or left where that is negative, and masked. Bits that come from the byte beside it
// must be outside the mask.
template <int RIGHT, int MASK>
inline Codes bits_of(Codes c) {
  if constexpr (RIGHT > 0) c = _mm512_srli_epi16(c, RIGHT);
  if constexpr (RIGHT < 0) c = _mm512_slli_epi16(c, -RIGHT);
  return _mm512_and_si512(c, _mm512_set1_epi8(MASK));
}
inline Vec load(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline Codes looked_up(Codes c) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kLookup)), c);
}
template <int I>
inline Vec byte_of(Codes c) {  // of every output's four
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(c, 8 * I), _mm512_set1_epi32(0xff)))};
}
#elif DFLASH_VEC == 256
using Codes = __m256i;
inline Codes load_codes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Codes both(Codes a, Codes b) { return _mm256_or_si256(a, b); }
template <int RIGHT, int MASK>
inline Codes bits_of(Codes c) {
  if constexpr (RIGHT > 0) c = _mm256_srli_epi16(c, RIGHT);
  if constexpr (RIGHT < 0) c = _mm256_slli_epi16(c, -RIGHT);
  return _mm256_and_si256(c, _mm256_set1_epi8(MASK));
}
inline Vec load(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
inline Codes looked_up(Codes c) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kLookup)), c);
}
template <int I>
inline Vec byte_of(Codes c) {
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c, 8 * I), _mm256_set1_epi32(0xff)))};
}
#else
struct Codes {
  uint8_t v[4 * Vec::W];
};
inline Codes load_codes(const uint8_t* p) {
  Codes c;
  std::memcpy(&c, p, sizeof(c));
  return c;
}
inline Codes both(Codes a, Codes b) {
  for (int i = 0; i < 4 * Vec::W; ++i) a.v[i] |= b.v[i];
  return a;
}
template <int RIGHT, int MASK>
inline Codes bits_of(Codes c) {
  for (uint8_t& v : c.v) v = uint8_t((RIGHT > 0 ? v >> (RIGHT > 0 ? RIGHT : 0) : v << (RIGHT < 0 ? -RIGHT : 0)) & MASK);
  return c;
}
inline Vec load(const uint8_t* p) { return each([&](int i) { return float(p[i]); }); }
inline Codes looked_up(Codes c) {
  for (uint8_t& v : c.v) v = kLookup[v];
  return c;
}
template <int I>
inline Vec byte_of(const Codes& c) { return each([&](int j) { return float(c.v[4 * j + I]); }); }
#endif

constexpr int kPieceRegisters = 8;  // of four k

// An instruction for dot products of int8 takes unsigned codes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define DFLASH_VNNI 1
#else
#define DFLASH_VNNI 0
#endif

// Codes of 8 bits count as signed where the sums have no such instruction; then there is no offset.
#if DFLASH_VEC && !DFLASH_VNNI
constexpr bool kSignedCodes = true;
#else
constexpr bool kSignedCodes = false;
#endif

// ---- records -------------------------------------------------------------------------------------------------------

// Where the record of piece b is.
template <Format F>
inline const uint8_t* record_of(const uint8_t* w, int64_t b) {
  constexpr FormatLayout l = layout_of(F);
  return w + b * l.piece + (l.head ? (b / (kSuper / kPiece) + 1) * l.head : 0);
}
template <Format F>
inline const uint8_t* head_of(const uint8_t* w, int64_t b) {
  constexpr int64_t inside = kSuper / kPiece;
  return w + b / inside * (layout_of(F).piece * inside + layout_of(F).head);
}

template <Format F> constexpr bool kFiveBits = F == Format::q5_0 || F == Format::q5_1 || F == Format::q5_k;
template <Format F> constexpr bool kLookedUp = F == Format::iq4_nl || F == Format::iq4_xs;
template <Format F> constexpr bool kEightBits = F == Format::q8_0 || kLookedUp<F>;  // what is multiplied
template <Format F> constexpr bool kHalfMinimum = F == Format::q4_1 || F == Format::q5_1;  // a float16 of its own
template <Format F> constexpr bool kHasMinimum = kHalfMinimum<F> || F == Format::q4_k || F == Format::q5_k;
template <Format F> constexpr int kHalves = F == Format::q6_k ? 2 : 1;  // scales in a piece

// The codes of k = 4 * R ... 4 * R + 3 of the outputs of vector v.
template <Format F, int R>
inline DFLASH_INLINE Codes codes_of(const uint8_t* record, int v) {
  constexpr FormatLayout l = layout_of(F);
  const uint8_t* at = record + v * 4 * Vec::W;
  if constexpr (F == Format::q8_0) {
    Codes codes = load_codes(at + R * kLine);
#if DFLASH_VEC
    asm("" : "+v"(codes));  // or the compiler loads them for every row
#endif
    return codes;
  }
  const Codes low = bits_of<R % 2 * 4, 0x0f>(load_codes(at + R / 2 * kLine));
  if constexpr (kFiveBits<F>) return both(low, bits_of<R - 4, 0x10>(load_codes(at + l.high)));
  if constexpr (F == Format::q6_k)
    return both(low, bits_of<R % 4 * 2 - 4, 0x30>(load_codes(at + l.high + R / 4 * kLine)));
  if constexpr (kLookedUp<F>) return looked_up(low);
  return low;
}

// d of half `half` of a piece, for the outputs of vector v.
template <Format F>
inline DFLASH_INLINE Vec scale_of(const uint8_t* record, const uint8_t* head, int half, int v) {
  const uint8_t* at = record + layout_of(F).scales;
  if constexpr (F == Format::q4_k || F == Format::q5_k)
    return load(at + v * Vec::W) * load((const f16*)head + v * Vec::W);
  if constexpr (F == Format::q6_k || F == Format::iq4_xs)
    return load((const int8_t*)at + half * kBlock + v * Vec::W) * load((const f16*)head + v * Vec::W);
  return load((const f16*)at + v * Vec::W);
}
template <Format F>
inline DFLASH_INLINE Vec minimum_of(const uint8_t* record, const uint8_t* head, int v) {
  const uint8_t* at = record + layout_of(F).scales;
  if constexpr (kHalfMinimum<F>) return load((const f16*)at + kBlock + v * Vec::W);
  return load(at + kBlock + v * Vec::W) * load((const f16*)head + kBlock + v * Vec::W);
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
