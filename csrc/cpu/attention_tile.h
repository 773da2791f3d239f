// The inner loops of block_attention: keys transposed to float32, scores, softmax, weighted sum of values.
//
// Whatever the blocking over rows and keys, a score is the same chains of multiply-adds over D, and an output element
// one chain over visible keys in order of position. Blocking changes which chains run side by side, never a chain.
#pragma once

#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kSplit = 256;  // positions per softmax; splits start at multiples of kSplit
constexpr int kChain = 64;  // dimensions per chain of multiply-adds: longer ones round visibly worse in float32
constexpr int kTile = 64;   // keys converted at a time: small enough for the first-level cache
constexpr int W = Vec::W;

// ---- keys: rows of T -> kt[d][key] --------------------------------------------------------------------------------

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

template <class T>
inline void load_keys(const T* const* rows, int D, float* kt) {
  for (int d = 0; d < D; d += W) transpose_keys(rows, d, D, kt);
}

#if DFLASH_VEC
// Pairs of bf16 travel through the transposition as one 32-bit word: half the shuffles.
template <>
inline void load_keys<bf16>(const bf16* const* rows, int D, float* kt) {
  int d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    Vec r[W];
    for (int i = 0; i < W; ++i) r[i] = load(reinterpret_cast<const float*>(rows[i] + d));
    transpose(r);
    for (int i = 0; i < W; ++i) {
      store(kt + (d + 2 * i) * kTile, low_bf16(r[i]));
      store(kt + (d + 2 * i + 1) * kTile, high_bf16(r[i]));
    }
  }
  for (; d < D; d += W) transpose_keys(rows, d, D, kt);
}
#endif

// ---- scores: s[r][key] = cap(scale[key] * q[r] . k[key]) -----------------------------------------------------------

template <int R, int N>
inline void scores(const float* q, int64_t q_stride, const float* kt, int D, const float* scale, float softcap,
                   float* s) {
  for (int begin = 0; begin < D; begin += kChain) {
    const int end = begin + kChain < D ? begin + kChain : D;
    Vec acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) acc[r][n] = set1(0.0f);
    for (int d = begin; d < end; ++d) {
      Vec key[N];
      for (int n = 0; n < N; ++n) key[n] = load(kt + d * kTile + n * W);
      for (int r = 0; r < R; ++r) {
        const Vec x = set1(q[r * q_stride + d]);
        for (int n = 0; n < N; ++n) acc[r][n] = fma(x, key[n], acc[r][n]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) {
        float* to = s + r * kSplit + n * W;
        Vec x = begin ? load(to) + acc[r][n] : acc[r][n];
        if (end == D) x = x * load(scale + n * W);
        if (end == D && softcap > 0) x = vtanh(x / set1(softcap)) * set1(softcap);
        store(to, x);
      }
  }
}

template <int R>
inline void scores(const float* q, int64_t q_stride, const float* kt, int vectors, int D, const float* scale,
                   float softcap, float* s) {
  constexpr int N = DFLASH_VEC == 512 ? 4 : 2;
  int n = 0;
  for (; n + N <= vectors; n += N) scores<R, N>(q, q_stride, kt + n * W, D, scale + n * W, softcap, s + n * W);
  if (N == 4 && n + 2 <= vectors) {
    scores<R, 2>(q, q_stride, kt + n * W, D, scale + n * W, softcap, s + n * W);
    n += 2;
  }
  if (n < vectors) scores<R, 1>(q, q_stride, kt + n * W, D, scale + n * W, softcap, s + n * W);
}

// ---- softmax of one row over the visible keys [lo, hi) of a split
// ----------------------------------------------------

// What the weights of a split's first keys, those of an fp8 cache, take of its values' scale. None: no such keys.
struct ValueScale {
  float factor;
  int end;
};

// s <- exp(s - max). Lane l of the sum holds the positions that are l modulo W, whatever lo and hi are.
inline void softmax(float* s, int lo, int hi, const ValueScale& scale, float* max_out, float* sum_out) {
  const int begin = lo & -W, end = (hi + W - 1) & -W;
  for (int i = begin; i < lo; ++i) s[i] = -INFINITY;
  for (int i = hi; i < end; ++i) s[i] = -INFINITY;
  Vec top = set1(-INFINITY);
  for (int i = begin; i < end; i += W) top = vmax(top, load(s + i));
  float lane[W];
  store(lane, top);
  float m = lane[0];
  for (int i = 1; i < W; ++i) m = lane[i] > m ? lane[i] : m;
  const Vec shift = set1(m == -INFINITY ? 0.0f : m);
  Vec sum = set1(0.0f);
  for (int i = begin; i < end; i += W) {
    const Vec e = vexp(load(s + i) - shift);
    store(s + i, e);
    sum = sum + e;
  }
  for (int i = lo; i < hi && i < scale.end; ++i) s[i] *= scale.factor;
  *max_out = m;
  *sum_out = reduce_add(sum);
}

// ---- values: acc[r] += sum over keys [begin, end) of p[r][key] * v[key] ---------------------------------------------

template <int R, int N>
inline void weigh(const float* p, const float* v, int64_t stride, int begin, int end, float* acc) {
  Vec a[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) a[r][n] = load(acc + r * stride + n * W);
  for (int j = begin; j < end; ++j) {
    Vec value[N];
    for (int n = 0; n < N; ++n) value[n] = load(v + j * stride + n * W);
    for (int r = 0; r < R; ++r) {
      const Vec x = set1(p[r * kSplit + j]);
      for (int n = 0; n < N; ++n) a[r][n] = fma(x, value[n], a[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(acc + r * stride + n * W, a[r][n]);
}

// stride: of v's and acc's rows, a multiple of 16; all of it is computed.
template <int R>
inline void weigh(const float* p, const float* v, int64_t stride, int begin, int end, float* acc) {
  if (begin >= end) return;
  constexpr int N = DFLASH_VEC == 512 ? 4 : 2;
  int64_t d = 0;
  for (; d + N * W <= stride; d += N * W) weigh<R, N>(p, v + d, stride, begin, end, acc + d);
  for (; d < stride; d += W) weigh<R, 1>(p, v + d, stride, begin, end, acc + d);
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
