#include "cpu/quant.h"

#include "cpu/memory.h"
#include "cpu/quant_codes.h"

// The inner loops. A piece of one row takes eight dot products, a subtraction and one multiply-add, or two with a
// minimum, on 512 bits with VNNI; unpacking codes, 16 operations, is shared by the rows of a group. A core with one
// unit for both reaches 8 / 9 or 8 / 10 of its rate of dot products.

namespace dflash::DFLASH_ISA {
namespace {

// ---- integer sums of R rows over a piece, or half of one
// --------------------------------------------------------------

inline int32_t four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return four;
}

#if DFLASH_VEC == 512 && defined(__AVX512VNNI__)
constexpr bool kSignedCodes = false;
template <Format F, int R>
struct IntSums {
  __m512i v[R];
  template <int AT> DFLASH_INLINE void add(int r, Codes codes, const int8_t* x) {
    // Not the intrinsic: the compiler would load x into a register of its own, which takes an instruction more.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(v[r]) : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(x)));
  }
  DFLASH_INLINE void start(int r, int32_t init) { v[r] = _mm512_set1_epi32(init); }
  DFLASH_INLINE Vec finish(int r) const { return {_mm512_castsi512_ps(v[r])}; }
};
#elif DFLASH_VEC
// Without VNNI: products of bytes are added in pairs to 16 bits, FOLD registers of them before they no longer fit. With
// codes of 8 bits one pair does not fit, unless the code's sign goes to x.
template <Format F> constexpr int kFold = F == Format::q8_0 ? 1 : F == Format::q6_k ? 2 : F == Format::q5_k ? 4 : 8;
#if DFLASH_VEC == 512
inline __m512i zero_bits() { return _mm512_setzero_si512(); }
inline __m512i of_four(int32_t x) { return _mm512_set1_epi32(x); }
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
inline __m256i of_four(int32_t x) { return _mm256_set1_epi32(x); }
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
constexpr bool kSignedCodes = true;
template <Format F, int R>
struct IntSums {
  Codes sum[R], pairs[R];
  template <int AT> DFLASH_INLINE void add(int r, Codes codes, const int8_t* x) {
    const Codes found = F == Format::q8_0 ? signed_products(codes, of_four(four(x))) :
                                            pair_products(codes, of_four(four(x)));
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
constexpr bool kSignedCodes = false;
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

// ---- the loop
// --------------------------------------------------------------------------------------------------------

constexpr int kPieceRegisters = 8;


// A function in place, whatever the compiler thinks of its size: its arrays are to be registers.
#define DFLASH_HERE __attribute__((always_inline))

// x: the first of the group's rows, of ldx in a piece.
template <Format F, int R, int S>
DFLASH_NOINLINE void micro_quant(const RowPiece* x, int64_t ldx, const uint8_t* const* w, int64_t begin, int64_t end,
                                 Ahead ahead, float* c, int64_t ldc) {
  constexpr int V = kBlockVectors, H = kHalves<F>, N = kPieceRegisters / H;
  Sums<R, S * V> sums(c, ldc);
  x += begin * ldx;
  for (int64_t b = begin; b < end; ++b, x += ldx) {
    times<ceil_lines(layout_of(F).piece)>([&](auto) DFLASH_HERE { ahead.template ask<S>(w); });
    times<S>([&](auto s) DFLASH_HERE {
      const uint8_t *record = record_of<F>(w[s], b), *head = head_of<F>(w[s], b);
      times<V>([&](auto v) DFLASH_HERE {
        asm volatile("" : "+r"(x));  // x is loaded for each vector: kept for the next one, it would fill the registers
        times<H>([&](auto half) DFLASH_HERE {
          IntSums<F, R> ints;
          times<R>([&](auto r) DFLASH_HERE { ints.start(r, x[r].init[half]); });
          times<N>([&](auto i) DFLASH_HERE {
            const Codes codes = codes_of<F, half * N + i>(record, v);
            times<R>([&](auto r) DFLASH_HERE { ints.template add<i>(r, codes, x[r].q + (half * N + i) * 4); });
          });
          const Vec d = scale_of<F>(record, head, half, v);
          times<R>([&](auto r) DFLASH_HERE {
            Vec& sum = sums.v[(r * S + s) * V + v];
            sum = fma(d, ints.finish(r) - set1(x[r].base), sum);
          });
        });
        if constexpr (kHasMinimum<F>) {
          const Vec m = minimum_of<F>(record, head, v);
          times<R>([&](auto r) DFLASH_HERE {
            Vec& sum = sums.v[(r * S + s) * V + v];
            sum = fma(m, set1(x[r].sum), sum);
          });
        }
      });
    });
  }
  sums.store_to(c, ldc);
}

// Several groups take turns over as many pieces, which the second-level cache keeps meanwhile.
constexpr int64_t kChunk = 64;

// As in gemm_rows.h: how many lines ahead of its loads a thread asks for.
inline int64_t ahead_lines(int64_t rows) { return rows > 1 ? 128 : 32; }

// Rows in one group beside S blocks, of 32 registers or 16.
constexpr int rows_beside(int blocks) {
  if (DFLASH_VEC == 512) return blocks == 4 ? 4 : 8;
  return DFLASH_VEC ? 4 / blocks : 1 / blocks;
}

template <Format F, int S, int R>
inline void group(const QuantSums& p, int64_t row, int rows, int64_t begin, int64_t end, Ahead ahead) {
  if (rows == R)
    return micro_quant<F, R, S>(p.x + row, p.rows, p.weights, begin, end, ahead,
                                p.c + row * p.ldc, p.ldc);
  if constexpr (R > 1) group<F, S, R - 1>(p, row, rows, begin, end, ahead);
}

template <Format F, int S>
inline void row_groups(const QuantSums& p) {
  constexpr int most = rows_beside(S);
  const int64_t groups = ceil_div(p.rows, most), chunk = groups > 1 && p.pieces > kChunk ? kChunk : p.pieces;
  for (int64_t r = 0; r < p.rows; ++r) std::memset(p.c + r * p.ldc, 0, S * kBlock * sizeof(float));
  for (int64_t b = 0; b < p.pieces; b += chunk) {
    const int64_t end = p.pieces - b < chunk ? p.pieces : b + chunk;
    for (int64_t g = 0, r = 0, m; g < groups; ++g, r += m) {
      m = ceil_div(p.rows - r, groups - g);
      const int64_t at = format_bytes(F, b);
      Ahead ahead{at + ahead_lines(p.rows) * kLine / S, kLine};
      if (groups > 1) ahead = {at + format_bytes(F, chunk) * (groups + g) / groups, ceil_div(kLine, groups)};
      group<F, S, most>(p, r, int(m), b, end, ahead);
    }
  }
}

template <Format F>
void sums_of(const QuantSums& p) {
  if constexpr (rows_beside(4) > 0)
    if (p.blocks == 4 && p.rows <= rows_beside(4)) return row_groups<F, 4>(p);
  if constexpr (rows_beside(2) > 0) {
    if (p.blocks == 4) {
      QuantSums half = p;
      half.blocks = 2;
      sums_of<F>(half);
      half.weights += 2;
      half.c += 2 * kBlock;
      return sums_of<F>(half);
    }
    if (p.blocks == 2 && (DFLASH_VEC == 512 || p.rows <= rows_beside(2))) return row_groups<F, 2>(p);
  }
  for (int s = 0; s < p.blocks; ++s) {
    QuantSums one = p;
    one.blocks = 1;
    one.weights += s;
    one.c += s * kBlock;
    row_groups<F, 1>(one);
  }
}

// ---- rows of x
// --------------------------------------------------------------------------------------------------------

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

// ---- elements
// ---------------------------------------------------------------------------------------------------------

// Output j's element k of a record.
template <Format F>
inline float element_of(const uint8_t* record, const uint8_t* head, int j, int k) {
  constexpr FormatLayout l = layout_of(F);
  const int at = j * 4 + k % 4, r = k / 4;
  int q = F == Format::q8_0 ? record[r * kLine + at] : record[r / 2 * kLine + at] >> r % 2 * 4 & 15;
  if (F == Format::q5_k) q |= (record[l.high + at] >> r & 1) << 4;
  if (F == Format::q6_k) q |= (record[l.high + r / 4 * kLine + at] >> r % 4 * 2 & 3) << 4;
  const uint8_t* scales = record + l.scales;
  const auto half_at = [](const uint8_t* p, int i) { return to_float(reinterpret_cast<const f16*>(p)[i]); };
  float d = 0, m = 0;
  if (F == Format::q6_k) d = float(reinterpret_cast<const int8_t*>(scales)[k / 16 * kBlock + j]) * half_at(head, j);
  else if (l.head) d = float(scales[j]) * half_at(head, j);
  else d = half_at(scales, j);
  if (F == Format::q4_1) m = half_at(scales, kBlock + j);
  else if (kHasMinimum<F>) m = float(scales[kBlock + j]) * half_at(head, kBlock + j);
  return d * float(q - l.offset) + m;
}

// A record as floats, 16 outputs for each k.
template <Format F>
inline void widen_record(const uint8_t* record, const uint8_t* head, float* to) {
  for (int v = 0; v < kBlockVectors; ++v) {
    const Vec m = kHasMinimum<F> ? minimum_of<F>(record, head, v) : set1(0.0f);
    times<kPieceRegisters>([&](auto r) {
      const Codes codes = codes_of<F, r>(record, v);
      const Vec d = scale_of<F>(record, head, r / (kPieceRegisters / kHalves<F>), v);
      times<4>([&](auto i) {
        const Vec y = d * (byte_of<i>(codes) - set1(float(layout_of(F).offset)));
        store(to + (r * 4 + i) * kBlock + v * Vec::W, kHasMinimum<F> ? y + m : y);
      });
    });
  }
}

// Floats of a piece as pack_weight lays elements out.
inline void put(const float* from, bf16* to) {
  for (int k = 0; k < kPiece; k += 2) {
    bf16 even[kBlock], odd[kBlock];
    for (int v = 0; v < kBlock; v += Vec::W) {
      store(even + v, load(from + k * kBlock + v));
      store(odd + v, load(from + (k + 1) * kBlock + v));
    }
    for (int j = 0; j < kBlock; ++j) to[k * kBlock + 2 * j] = even[j], to[k * kBlock + 2 * j + 1] = odd[j];
  }
}
template <class T>
inline void put(const float* from, T* to) {
  for (int i = 0; i < kPiece * kBlock; i += Vec::W) store(to + i, load(from + i));
}

// f(T{}) for an element's type.
template <class F>
inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
  }
}

template <Format F>
void widen(const QuantWiden& p) {
  alignas(64) float elements[kPiece * kBlock];
  for (int64_t b = 0; b < p.pieces; ++b) {
    widen_record<F>(record_of<F>(p.weight, b), head_of<F>(p.weight, b), elements);
    with_type(p.dtype, [&](auto t) { put(elements, static_cast<decltype(t)*>(p.to) + b * kPiece * kBlock); });
  }
}

template <Format F>
void row(const QuantRow& p) {
  const uint8_t* weight = p.weight + p.n / kBlock * format_bytes(F, p.pieces);
  float elements[kPiece];
  for (int64_t b = 0; b < p.pieces; ++b) {
    for (int k = 0; k < kPiece; ++k)
      elements[k] = element_of<F>(record_of<F>(weight, b), head_of<F>(weight, b), int(p.n % kBlock), k);
    with_type(p.dtype, [&](auto t) {
      for (int k = 0; k < kPiece; k += Vec::W)
        store(static_cast<decltype(t)*>(p.to) + b * kPiece + k, load(elements + k));
    });
  }
}

// f(format) with the format as a constant.
template <class F>
inline void with_format(Format format, F f) {
  switch (format) {
    case Format::none: return;
    case Format::q4_0: return f(std::integral_constant<Format, Format::q4_0>{});
    case Format::q4_1: return f(std::integral_constant<Format, Format::q4_1>{});
    case Format::q8_0: return f(std::integral_constant<Format, Format::q8_0>{});
    case Format::q4_k: return f(std::integral_constant<Format, Format::q4_k>{});
    case Format::q5_k: return f(std::integral_constant<Format, Format::q5_k>{});
    case Format::q6_k: return f(std::integral_constant<Format, Format::q6_k>{});
  }
}

}  // namespace

void quant_rows(const QuantRows& p) {
  with_type(p.dtype, [&](auto t) { round_rows<decltype(t)>(p); });
}

void quant_sums(const QuantSums& p) {
  with_format(p.format, [&](auto format) { sums_of<decltype(format)::value>(p); });
}

void quant_widen(const QuantWiden& p) {
  with_format(p.format, [&](auto format) { widen<decltype(format)::value>(p); });
}

void quant_row(const QuantRow& p) {
  with_format(p.format, [&](auto format) { row<decltype(format)::value>(p); });
}

}  // namespace dflash::DFLASH_ISA
