// Rounds rows of x to int8, a piece at a time, with a power of two as its scale.
//
// Every thread rounds all rows for itself, so that this counts beside a thread's share of the sums. Four pieces at a
// time share the arithmetic on what each has one of.
#pragma once

#include "cpu/memory.h"
#include "cpu/quant_codes.h"

namespace dflash::DFLASH_ISA {
namespace {

// The largest magnitude becomes 64 to 127: the next power of two where 127.5 would be reached. It has e = (its upper
// half + 1) >> 7, less this:
constexpr int kExponentOffset = 127 + 6;
constexpr int kLowest = -100, kHighest = 100;  // exponents e
constexpr int64_t kAtOnceRounded = 64;  // pieces whose scales are found before they are rounded
constexpr int32_t kOne = 0x3f800000, kBase = 0x4b400000, kNan = 0x7fc00000;  // bits of 1, 1.5 * 2^23 and NaN

inline void not_finite(RowPiece& to) {
  std::memset(&to, 0, sizeof(to));
  to.init[0] = to.init[1] = kNan;
}

#if DFLASH_VEC
// Four numbers of which the largest has the largest magnitude's upper half.
template <class T>
inline __m128i magnitudes(const T* x) {
#if DFLASH_VEC == 512
  const auto of = [&](int i) {
    return _mm512_and_si512(_mm512_castps_si512(load(x + i * Vec::W).v), _mm512_set1_epi32(0x7fffffff));
  };
  const __m512i all = _mm512_max_epu32(of(0), of(1));
  const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#else
  const auto of = [&](int i) {
    return _mm256_and_si256(_mm256_castps_si256(load(x + i * Vec::W).v), _mm256_set1_epi32(0x7fffffff));
  };
  const __m256i half = _mm256_max_epu32(_mm256_max_epu32(of(0), of(1)), _mm256_max_epu32(of(2), of(3)));
#endif
  return _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
#if DFLASH_VEC == 256
inline __m128i magnitudes(const bf16* x) {
  const auto of = [&](int i) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i*)x + i), _mm256_set1_epi16(0x7fff));
  };
  const __m256i half = _mm256_max_epu16(of(0), of(1));
  const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return _mm_max_epu16(eight, _mm_slli_epi32(eight, 16));
}
#endif

// A piece times `inverse`, rounded.
template <class T>
inline __m256i rounded_piece(const T* x, float inverse) {
#if DFLASH_VEC == 512
  const auto of = [&](int i) {
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((load(x + i * Vec::W) * set1(inverse)).v));
  };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(of(0)), of(1), 1);
#else
  const auto of = [&](int i) { return _mm256_cvtps_epi32((load(x + i * Vec::W) * set1(inverse)).v); };
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(of(0), of(1)), _mm256_packs_epi32(of(2), of(3)));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
}
#if DFLASH_VEC == 256
// Zeros below make floats of bf16, in an order that packing undoes.
inline __m256i rounded_piece(const bf16* x, float inverse) {
  const auto round = [&](__m256i v) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(v), _mm256_set1_ps(inverse)));
  };
  const auto words = [&](int i) {
    const __m256i half = _mm256_loadu_si256((const __m256i*)x + i), zero = _mm256_setzero_si256();
    return _mm256_packs_epi32(round(_mm256_unpacklo_epi16(zero, half)), round(_mm256_unpackhi_epi16(zero, half)));
  };
  return _mm256_permute4x64_epi64(_mm256_packs_epi16(words(0), words(1)), 0xd8);
}
#endif

// The largest magnitude's upper half of each of four pieces.
template <class T>
inline __m128i tops(const T* const* x) {
  __m128i most[4];
  for (int i = 0; i < 4; ++i) most[i] = magnitudes(x[i]);
  for (int i = 0; i < 4; i += 2)
    most[i] = _mm_max_epu32(_mm_unpacklo_epi32(most[i], most[i + 1]), _mm_unpackhi_epi32(most[i], most[i + 1]));
  return _mm_srli_epi32(_mm_max_epu32(_mm_unpacklo_epi64(most[0], most[2]), _mm_unpackhi_epi64(most[0], most[2])), 16);
}

// Four pieces times `inverse`, rounded, to their places. The sums of their first halves, then of their second.
template <class T>
inline __m256i place_rounded(const T* const* x, const float* inverse, RowPiece* const* to) {
  __m256i sums[4];  // of eight bytes, each 128 too large
  for (int i = 0; i < 4; ++i) {
    const __m256i q = rounded_piece(x[i], inverse[i]);
    _mm256_storeu_si256((__m256i*)to[i]->q, q);
    sums[i] = _mm256_sad_epu8(_mm256_xor_si256(q, _mm256_set1_epi8(char(0x80))), _mm256_setzero_si256());
  }
  const auto pair = [&](int i) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(sums[i]), _mm256_castsi256_ps(sums[i + 1]), 0x88));
  };
  return _mm256_sub_epi32(_mm256_hadd_epi32(pair(0), pair(2)), _mm256_set1_epi32(128 * int(kPiece) / 2));
}

#if DFLASH_VEC == 512
// The same for bf16, a vector a piece, in little more than half of the instructions.
inline __m128i tops(const bf16* const* x) {
  const auto of = [&](int i) { return _mm512_and_si512(_mm512_loadu_si512(x[i]), _mm512_set1_epi16(0x7fff)); };
  const auto halves = [&](__m512i a, __m512i b) {
    return _mm512_max_epu16(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee));
  };
  const __m512i a = halves(of(0), of(1)), b = halves(of(2), of(3));
  __m512i m = _mm512_max_epu16(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));  // a lane a piece
  m = _mm512_max_epu16(m, _mm512_shuffle_epi32(m, _MM_PERM_BADC));
  m = _mm512_max_epu16(m, _mm512_shuffle_epi32(m, _MM_PERM_CDAB));
  m = _mm512_max_epu16(m, _mm512_slli_epi32(m, 16));
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castsi512_si128(_mm512_srli_epi32(_mm512_permutexvar_epi32(first, m), 16));
}
inline __m256i place_rounded(const bf16* const* x, const float* inverse, RowPiece* const* to) {
  const __m512i zero = _mm512_setzero_si512();
  // Zeros below make floats of bf16, in an order that packing undoes.
  const auto words = [&](int i) {
    const auto round = [&](__m512i v) {
      return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(v), _mm512_set1_ps(inverse[i])));
    };
    const __m512i all = _mm512_loadu_si512(x[i]);
    return _mm512_packs_epi32(round(_mm512_unpacklo_epi16(zero, all)), round(_mm512_unpackhi_epi16(zero, all)));
  };
  __m512i sums[2];  // of eight bytes, each 128 too large
  for (int i = 0; i < 2; ++i) {
    const __m512i q = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
                                               _mm512_packs_epi16(words(2 * i), words(2 * i + 1)));
    _mm256_storeu_si256((__m256i*)to[2 * i]->q, _mm512_castsi512_si256(q));
    _mm256_storeu_si256((__m256i*)to[2 * i + 1]->q, _mm512_extracti64x4_epi64(q, 1));
    sums[i] = _mm512_sad_epu8(_mm512_xor_si512(q, _mm512_set1_epi8(char(0x80))), zero);
  }
  const auto every_other = [&](int at) {
    const __m512i from = _mm512_setr_epi32(at, at + 8, at + 16, at + 24, at + 4, at + 12, at + 20, at + 28,  //
                                           0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutex2var_epi32(sums[0], from, sums[1]));
  };
  return _mm256_sub_epi32(_mm256_add_epi32(every_other(0), every_other(2)), _mm256_set1_epi32(128 * int(kPiece) / 2));
}
#endif

// Of n pieces in a row of x, `to_stride` places apart. Every fourth begins a group, whose pieces are lanes; the last
// piece comes again where a group has none left. All scales are found first: a piece's way from its largest magnitude
// to its bytes is long, and in one loop the next piece would wait for it.
template <class T>
inline void round_pieces(const T* x, int64_t n, int offset, int halves, RowPiece* to, int64_t to_stride) {
  const auto number = [](int32_t i) { return _mm_set1_epi32(i); };
  const auto group = [&](int64_t b, auto of) {
    for (int64_t i = 0; i < 4; ++i) of(i, b + i < n ? b + i : n - 1);
  };
  alignas(16) int32_t scales[kAtOnceRounded];
  alignas(16) float inverse[kAtOnceRounded];
  int bad = 0;
  for (int64_t b = 0; b < n; b += 4) {
    const T* from[4];
    group(b, [&](int64_t i, int64_t at) { from[i] = x + at * kPiece; });
    const __m128i e = _mm_sub_epi32(_mm_srli_epi32(_mm_add_epi32(tops(from), number(1)), 7), number(kExponentOffset));
    bad |= _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(e, number(kHighest))));
    const __m128i scale = _mm_slli_epi32(_mm_max_epi32(e, number(kLowest)), 23);
    _mm_store_si128((__m128i*)(scales + b), scale);
    _mm_store_si128((__m128i*)(inverse + b), _mm_sub_epi32(number(kOne), scale));
  }
  for (int64_t b = 0; b < n; b += 4) {
    const T* from[4];
    RowPiece* place[4];
    group(b, [&](int64_t i, int64_t at) { from[i] = x + at * kPiece, place[i] = to + at * to_stride; });
    const __m128i scale = _mm_load_si128((const __m128i*)(scales + b));
    const __m256i both = place_rounded(from, inverse + b, place);
    const __m128i first = _mm256_castsi256_si128(both), second = _mm256_extracti128_si256(both, 1);
    const __m128i sum = _mm_add_epi32(first, second), base = _mm_add_epi32(number(kBase), scale);
    const auto init = [&](__m128i q) { return _mm_sub_epi32(base, _mm_mullo_epi32(number(offset), q)); };
    const __m128i scaled = _mm_castps_si128(
        _mm_mul_ps(_mm_castsi128_ps(_mm_add_epi32(number(kOne), scale)), _mm_cvtepi32_ps(sum)));

    const __m128i init0 = init(halves == 2 ? first : sum), init1 = init(second);
    const __m128i inits[2] = {_mm_unpacklo_epi32(init0, init1), _mm_unpackhi_epi32(init0, init1)};
    const __m128i rest[2] = {_mm_unpacklo_epi32(base, scaled), _mm_unpackhi_epi32(base, scaled)};
    for (int i = 0; i < 4; i += 2) {
      _mm_store_si128((__m128i*)place[i]->init, _mm_unpacklo_epi64(inits[i / 2], rest[i / 2]));
      _mm_store_si128((__m128i*)place[i + 1]->init, _mm_unpackhi_epi64(inits[i / 2], rest[i / 2]));
    }
  }
  if (bad)
    for (int64_t i = 0; i < n; ++i)
      if (scales[i] > kHighest * (1 << 23)) not_finite(to[i * to_stride]);
}
#else
template <class T>
inline void round_pieces(const T* x, int64_t n, int offset, int halves, RowPiece* to, int64_t to_stride) {
  for (int64_t i = 0; i < n; ++i, x += kPiece, to += to_stride) {
    uint32_t top = 0;
    for (int k = 0; k < kPiece; ++k) {
      const uint32_t bits = float_to_bits(to_float(x[k])) & 0x7fffffff;
      top = bits > top ? bits : top;
    }
    int e = int(((top >> 16) + 1) >> 7) - kExponentOffset;
    if (e > kHighest) {
      not_finite(*to);
      continue;
    }
    e = e < kLowest ? kLowest : e;
    const float inverse = bits_to_float(uint32_t(kOne - e * (1 << 23)));
    const auto half = [&](int first) {
      int32_t sum = 0;
      for (int k = first; k < first + kPiece / 2; ++k) {
        const int32_t q = int32_t(std::nearbyint(to_float(x[k]) * inverse));
        to->q[k] = int8_t(q);
        sum += q;
      }
      return sum;
    };
    const int32_t sums[2] = {half(0), half(kPiece / 2)};
    const int32_t base = kBase + e * (1 << 23);
    to->init[0] = base - offset * (halves == 2 ? sums[0] : sums[0] + sums[1]);
    to->init[1] = base - offset * sums[1];
    to->base = bits_to_float(uint32_t(base));
    to->sum = bits_to_float(uint32_t(kOne + e * (1 << 23))) * float(sums[0] + sums[1]);
  }
}
#endif

template <class T>
void round_rows(const QuantRows& p) {
  const int above = layout_of(p.format).offset, offset = kSignedCodes && above == 128 ? 0 : above;
  const int halves = p.format == Format::q6_k ? 2 : 1;
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t b = 0; b < p.pieces; b += kAtOnceRounded)
      round_pieces(static_cast<const T*>(p.x.data) + r * p.x.stride + b * kPiece,
                   p.pieces - b < kAtOnceRounded ? p.pieces - b : kAtOnceRounded, offset, halves,
                   p.out + b * p.rows + r, p.rows);
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
