// The keys of block_attention transposed, and what one multiply-add of it takes.
//
// Where the processor multiplies pairs of bf16 (and no tiles), an element E of a row is a Pair: two neighbours in D for
// a score, two neighbouring keys for the sum of values. Elsewhere it is a float. Rows of T -> kt[d / kAtOnce<E>][key].
#pragma once

#include "cpu/vec.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define DFLASH_ATTENTION_PAIRS 1
#else
#define DFLASH_ATTENTION_PAIRS 0
#endif

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kTile = 64;  // keys converted at a time: small enough for the first-level cache
constexpr int W = Vec::W;

struct Pair {
  bf16 first, second;
};
template <class E>
constexpr int kAtOnce = 1;
template <>
constexpr int kAtOnce<Pair> = 2;

// c + a * b, in every lane.
template <class E>
inline Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
inline Vec every_lane(const float* x) { return set1(*x); }

#if DFLASH_ATTENTION_PAIRS
template <>
inline Vec multiply_add<Pair>(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
inline Vec every_lane(const Pair* x) {
  float word;
  std::memcpy(&word, x, 4);
  return set1(word);
}
#endif

// Pages are too short for the hardware to see a stream in them. Into the second-level cache: the first level can wait
// for few lines at a time (on Zen 4, 1 core: 7 GB/s into the first level, 15 to 28 into the second).
// Inlined, because GCC drops calls of a function that does nothing but prefetch.
__attribute__((always_inline)) inline void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// Rows of keys or values to ask for.
struct Rows {
  const void* const* first = nullptr;
  int count = 0, bytes = 0;  // of a row

  // Parts i to j of `of` equal ones.
  Rows part(int i, int j, int of) const { return {first + count * i / of, count * j / of - count * i / of, bytes}; }
};

// Asks for rows, a line at a time, spread evenly over the steps of a loop: of many requests at once a core drops those
// that it has no buffer for.
class Asker {
 public:
  Asker(const Rows& rows, int steps)
      : row_(rows.first), bytes_(rows.bytes), lines_(rows.count * ((rows.bytes + kLine - 1) / kLine)), steps_(steps) {}

  __attribute__((always_inline)) void step() {
    for (due_ += lines_; due_ >= steps_; due_ -= steps_) {
      prefetch(static_cast<const char*>(*row_) + at_);
      at_ += kLine;
      if (at_ >= bytes_) at_ = 0, ++row_;
    }
  }

 private:
  static constexpr int kLine = 64;
  const void* const* row_;
  int bytes_, lines_, steps_, at_ = 0, due_ = 0;
};

#if DFLASH_VEC == 512
inline void transpose(Vec (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  __m512 u[16];  // u[4i + c], 128-bit lane l: column 4l + c of rows 4i .. 4i+3
  const auto lo = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto hi = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (int i = 0; i < 16; i += 4) {
    u[i] = lo(t[i], t[i + 2]);
    u[i + 1] = hi(t[i], t[i + 2]);
    u[i + 2] = lo(t[i + 1], t[i + 3]);
    u[i + 3] = hi(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 x0 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), x1 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 y0 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 y1 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    r[c].v = _mm512_shuffle_f32x4(x0, y0, 0x88);
    r[4 + c].v = _mm512_shuffle_f32x4(x1, y1, 0x88);
    r[8 + c].v = _mm512_shuffle_f32x4(x0, y0, 0xdd);
    r[12 + c].v = _mm512_shuffle_f32x4(x1, y1, 0xdd);
  }
}
inline Vec low_bf16(Vec x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 16))}; }
inline Vec high_bf16(Vec x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(int(0xffff0000))))};
}
#elif DFLASH_VEC == 256
inline void transpose(Vec (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    r[c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    r[4 + c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}
inline Vec low_bf16(Vec x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 16))}; }
inline Vec high_bf16(Vec x) {
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(int(0xffff0000))))};
}
#endif

// Columns [0, W) of kt, dimensions d .. d + min(W, D - d).
template <class T>
inline void transpose_keys(const T* const* rows, int d, int D, float* kt) {
  const int n = D - d < W ? D - d : W;
#if DFLASH_VEC
  Vec r[W];
  for (int i = 0; i < W; ++i) r[i] = load_n(rows[i] + d, n);
  transpose(r);
  for (int i = 0; i < n; ++i) store(kt + (d + i) * kTile, r[i]);
#else
  for (int j = 0; j < W; ++j)
    for (int i = 0; i < n; ++i) kt[(d + i) * kTile + j] = to_float(rows[j][d + i]);
#endif
}

// W rows. `ahead` is asked for meanwhile.
template <class E, class T>
inline void load_keys(const T* const* rows, const Rows& ahead, int D, float* kt) {
  Asker asker(ahead, W * ((D + W - 1) / W));
  for (int d = 0; d < D; d += W) {
    for (int i = 0; i < W; ++i) asker.step();
    transpose_keys(rows, d, D, kt);
  }
}

#if DFLASH_VEC
// Pairs of bf16 travel through the transposition as one 32-bit word: half the shuffles.
template <>
inline void load_keys<float, bf16>(const bf16* const* rows, const Rows& ahead, int D, float* kt) {
  Asker asker(ahead, W * ((D + 2 * W - 1) / (2 * W)));
  int d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    Vec r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      asker.step();
      r[i] = load(reinterpret_cast<const float*>(rows[i] + d));
    }
    transpose(r);
    for (int i = 0; i < W; ++i) {
      store(kt + (d + 2 * i) * kTile, low_bf16(r[i]));
      store(kt + (d + 2 * i + 1) * kTile, high_bf16(r[i]));
    }
  }
  for (; d < D; d += W) transpose_keys(rows, d, D, kt);
}
#endif

#if DFLASH_ATTENTION_PAIRS
template <>
__attribute__((noinline)) inline void load_keys<Pair, bf16>(const bf16* const* rows, const Rows& ahead, int D,
                                                            float* kt) {
  Asker asker(ahead, W * (D / (2 * W)));
  for (int d = 0; d < D; d += 2 * W) {
    Vec r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      asker.step();
      r[i] = load(reinterpret_cast<const float*>(rows[i] + d));
    }
    transpose(r);
    for (int i = 0; i < W; ++i) store(kt + (d / 2 + i) * kTile, r[i]);
  }
}
#endif

}  // namespace
}  // namespace dflash::DFLASH_ISA
