// The inner loops of block_attention: scores, softmax, weighted sum of values.
//
// Whatever the blocking over rows and keys, a score is the same chains of multiply-adds over D, and an output element
// one chain over visible keys in order of position. Blocking changes which chains run side by side, never a chain.
#pragma once

#include <type_traits>

#include "cpu/attention_keys.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kSplit = 256;  // positions per softmax; splits start at multiples of kSplit
constexpr int kBlockRows = DFLASH_VEC ? 6 : 4;  // rows whose sums are in registers: 12 or 24 vectors
constexpr int kChain = 64;  // dimensions per chain of multiply-adds: longer ones round visibly worse in float32

// f(r, n) for blocks of about equal size, rows r ... r + n of `count`.
template <class F>
inline void row_blocks(int count, F f) {
  for (int r = 0, n, left = (count + kBlockRows - 1) / kBlockRows; r < count; r += n, --left)
    f(r, n = (count - r + left - 1) / left);
}

// f(n) with n, from 1 to kBlockRows, as a constant.
template <int N = kBlockRows, class F>
inline void with_rows(int n, F f) {
  if constexpr (N > 1)
    if (n < N) return with_rows<N - 1>(n, f);
  f(std::integral_constant<int, N>{});
}

// ---- scores: s[r][key] = cap(scale[key] * q[r] . k[key]) -----------------------------------------------------------

// length: of a row of q, in elements.
// Loops over R and N are unrolled before GCC decides what is a register: it kept the sums in memory.
template <int R, int N, class E>
__attribute__((noinline)) void scores(const E* q, int64_t q_stride, const float* kt, int length, const float* scale,
                                      float softcap, const Rows& ahead, float* s) {
  Asker asker(ahead, length);
  constexpr int kLongest = kChain / kAtOnce<E>;
  for (int begin = 0; begin < length; begin += kLongest) {
    const int end = begin + kLongest < length ? begin + kLongest : length;
    Vec acc[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = set1(0.0f);
    for (int d = begin; d < end; ++d) {
      asker.step();
      Vec key[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) key[n] = load(kt + d * kTile + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec x = every_lane(q + r * q_stride + d);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[r][n] = multiply_add<E>(x, key[n], acc[r][n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* to = s + r * kSplit + n * W;
        Vec x = begin ? load(to) + acc[r][n] : acc[r][n];
        if (end == length) x = x * load(scale + n * W);
        if (end == length && softcap > 0) x = vtanh(x / set1(softcap)) * set1(softcap);
        store(to, x);
      }
  }
}

template <int R, class E>
inline void scores(const E* q, int64_t q_stride, const float* kt, int vectors, int length, const float* scale,
                   float softcap, const Rows& ahead, float* s) {
  constexpr int N = DFLASH_VEC == 512 ? 4 : 2;
  int n = 0;
  const auto next = [&](auto count) {
    scores<R, count>(q, q_stride, kt + n * W, length, scale + n * W, softcap, ahead.part(n, n + count, vectors),
                     s + n * W);
    n += count;
  };
  while (n + N <= vectors) next(std::integral_constant<int, N>{});
  if (N == 4 && n + 2 <= vectors) next(std::integral_constant<int, 2>{});
  if (n < vectors) next(std::integral_constant<int, 1>{});
}

// ---- softmax of one row over the visible keys [lo, hi) of a split ---------------------------------------------------

// exp(x) for x <= 0, and exactly 0 where that would be subnormal. NaN stays NaN.
inline Vec weight(Vec x) {
#if defined(__AMX_BF16__)
  return vexp(x);
#else
  return select_lt(x, set1(kLowestExp), set1(0.0f), vexp_below(x));
#endif
}

inline void store_weights(float* to, Vec x) { store(to, x); }
inline void store_weights(bf16* to, Vec x) {
#if DFLASH_ATTENTION_PAIRS
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x.v));
#else
  store(to, x);
#endif
}

alignas(64) constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static_assert(W <= 16);

// weights <- exp(s - max), times value_scale unless that is null; s and weights may be the same. Lane l of the sum
// holds the positions that are l modulo W, whatever lo and hi are.
template <class To>
inline void softmax(float* s, int lo, int hi, const float* value_scale, To* weights, float* max_out, float* sum_out) {
  const int begin = lo & -W, end = (hi + W - 1) & -W;
  const Vec none = set1(-INFINITY), lanes = load(kLanes);
  const auto hide = [&](int i) {  // in whole vectors, which the loads below wait for no longer than for any store
    const Vec at = lanes + set1(float(i));
    store(s + i, select_lt(at, set1(float(lo)), none, select_lt(at, set1(float(hi)), load(s + i), none)));
  };
  if (begin < lo) hide(begin);
  if (hi < end) hide(end - W);
  Vec top = none;
  for (int i = begin; i < end; i += W) top = vmax(top, load(s + i));
  const float m = reduce_max(top);
  const Vec shift = set1(m == -INFINITY ? 0.0f : m);
  Vec sum = set1(0.0f);
  for (int i = begin; i < end; i += W) {
    const Vec e = weight(load(s + i) - shift);
    sum = sum + e;
    store_weights(weights + i, value_scale ? e * load(value_scale + i) : e);
  }
  *max_out = m;
  *sum_out = reduce_add(sum);
}

// ---- values: acc[r] += sum over elements [begin, end) of weights[r] . values --------------------------------------

// N vectors of the values of one element of weights, from dimension d of the element's rows.
template <int N, class T>
inline void load_values(Vec (&value)[N], const T* const* rows, int d, int D, const float*) {
  for (int n = 0; n < N; ++n) value[n] = N == 1 ? load_n(rows[0] + d, D - d) : load(rows[0] + d + n * W);
}

#if DFLASH_ATTENTION_PAIRS
alignas(64) constexpr uint16_t kInterleaved[2][32] = {
    {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15,
     47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61,
     30, 62, 31, 63}};

template <int N>
inline void load_values(Vec (&value)[N], const bf16* const* rows, int d, int, const Pair*) {
  static_assert(N % 2 == 0);
  for (int n = 0; n < N; n += 2) {
    const __m512i a = _mm512_loadu_si512(rows[0] + d + n * W), b = _mm512_loadu_si512(rows[1] + d + n * W);
    for (int half = 0; half < 2; ++half)
      value[n + half].v =
          _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, _mm512_load_si512(kInterleaved[half]), b));
  }
}
#endif

template <int R, int N, class E, class T>
__attribute__((noinline)) void weigh(const E* weights, const T* const* rows, const Rows& ahead, int d, int D,
                                     int64_t stride, int begin, int end, float* acc) {
  Asker asker(ahead, end - begin);
  Vec a[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) a[r][n] = load(acc + r * stride + d + n * W);
  for (int j = begin; j < end; ++j) {
    asker.step();
    Vec value[N];
    load_values(value, rows + j * kAtOnce<E>, d, D, weights);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x = every_lane(weights + r * (kSplit / kAtOnce<E>) + j);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) a[r][n] = multiply_add<E>(x, value[n], a[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(acc + r * stride + d + n * W, a[r][n]);
}

// stride: of acc's rows, which have room for whole vectors.
template <int R, class E, class T>
inline void weigh(const E* weights, const T* const* rows, const Rows& ahead, int D, int64_t stride, int begin, int end,
                  float* acc) {
  if (begin >= end) return;
  constexpr int N = DFLASH_VEC == 512 ? 4 : 2;
  int d = 0;
  const auto next = [&](auto count) {
    const int to = d + count * W < D ? d + count * W : D;
    weigh<R, count>(weights, rows, ahead.part(d, to, D), d, D, stride, begin, end, acc);
    d += count * W;
  };
  while (d + N * W <= D) next(std::integral_constant<int, N>{});
  if constexpr (N == 4)
    while (d + 2 * W <= D) next(std::integral_constant<int, 2>{});
  if constexpr (kAtOnce<E> == 1)
    while (d < D) next(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
