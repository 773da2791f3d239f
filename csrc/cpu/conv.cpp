// grouped_conv: T rows of H elements are read and written once, taps * G numbers a row and the base kernel are read:
// e * (2 T H + taps (T G + H)) bytes. With the addition and the norm, e * (2 T H + H) more. The floor is that over the
// bandwidth of memory. Two taps are 4 multiply-adds an element.
//
// Two rows are computed at a time: the row before them and the base kernel are in the cache then, a vector of the base
// kernel serves both, and the two rows after them are asked for. With the norm, out's own memory keeps the result until
// it is normed. What is left to save are conversions: bfloat16 rows are taken apart into elements of even and of odd
// place, which needs one instruction for each, and put together likewise (Pair). Coefficients of a few rows become
// float32 first, to be broadcast from memory.
//
// acc = fma(delta, x, fma(base, x, acc)): products of 16-bit numbers are exact, so that fusing changes nothing, and
// every instruction set has the same bits.
#include "cpu/conv.h"

#include <algorithm>

#include "cpu/conv_pair.h"
#include "cpu/memory.h"
#include "cpu/norm_row.h"
#include "cpu/parallel.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int64_t kTileRows = 8;  // whose coefficients are widened at a time

template <class T, ConvRounding R>
inline Vec add_tap(Vec acc, Vec base, Vec delta, Vec x) {
  if constexpr (R == ConvRounding::end) return fma(delta, x, fma(base, x, acc));
  if constexpr (R == ConvRounding::reference)
    return rounded<T>(fma(delta, x, rounded<T>(acc + rounded<T>(base * x))));
  return rounded<T>(acc + rounded<T>(rounded<T>(base + delta) * x));
}

// One row, which has `taps` rows of its own block at hand. delta: (p.taps, groups).
template <class T, ConvRounding R>
void convolve(const GroupedConvParams& p, const T* x, int64_t taps, const float* delta, T* out) {
  const T* base = static_cast<const T*>(p.base);
  const int64_t group = p.width / p.groups;
  for (int64_t g = 0; g < p.groups; ++g)
    each_vector(g * group, (g + 1) * group, [&](int64_t c, auto lanes) {
      Vec acc = set1(0.0f);
      for (int64_t t = 0; t < taps; ++t)
        acc = add_tap<T, R>(acc, load_n(base + t * p.width + c, lanes), set1(delta[t * p.groups + g]),
                            load_n(x - t * p.x.stride + c, lanes));
      store_n(out + c, acc, lanes);
    });
}

// One or two rows of a block for two taps, rounded once, and groups that fill pairs, or half pairs. First: no row of
// the block comes before them. deltas: (Rows, 2, groups).
template <class T, int Rows, bool First>
void convolve_pairs(const GroupedConvParams& p, const T* x, const float* deltas, T* out) {
  using P = Pair<T>;
  const T* base = static_cast<const T*>(p.base);
  const int64_t groups = p.groups, group = p.width / groups, width = p.width, next = p.x.stride;
  const P zero{set1(0.0f), set1(0.0f)};
  const auto pair = [&](int64_t c, const float* d, auto spread) {
    const P fixed0 = P::load(base + c), fixed1 = P::load(base + width + c);
    for (int r = 0; r < Rows; ++r) prefetch(x + (Rows + r) * next + c);
    const P now = P::load(x + c);
    P acc = fma(spread(d), now, fma(fixed0, now, zero));
    if constexpr (!First) {
      const P before = P::load(x - next + c);
      acc = fma(spread(d + groups), before, fma(fixed1, before, acc));
    }
    acc.store(out + c);
    if constexpr (Rows == 2) {
      const P after = P::load(x + next + c);
      acc = fma(spread(d + 2 * groups), after, fma(fixed0, after, zero));
      acc = fma(spread(d + 3 * groups), now, fma(fixed1, now, acc));
      acc.store(out + p.out.stride + c);
    }
  };
  if (group < P::kSize)
    for (int64_t g = 0, c = 0; g < groups; g += 2, c += P::kSize)
      pair(c, deltas + g, [](const float* d) { return P::halves(d); });
  else
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = g * group; c < (g + 1) * group; c += P::kSize)
        pair(c, deltas + g, [](const float* d) { return P{set1(*d), set1(*d)}; });
}

template <class T>
void widen(const GroupedConvParams& p, int64_t row, int64_t n, float* delta) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t t = 0; t < p.taps; ++t, delta += p.groups) {
      const T* d = static_cast<const T*>(p.delta.data) + (row + r) * p.delta.stride + t * p.delta_tap;
      each_vector(0, p.groups, [&](int64_t g, auto lanes) { store_n(delta + g, load_n(d + g, lanes), lanes); });
    }
}

template <class T, ConvRounding R>
void run_rounding(const GroupedConvParams& p) {
  const int64_t grain = 1 + 16384 / (p.width + 1), group = p.width / p.groups;
  const bool pairs = R == ConvRounding::end && p.taps == 2 &&
                     (group % Pair<T>::kSize == 0 || (2 * group == Pair<T>::kSize && p.groups % 2 == 0));
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
    static thread_local ThreadMemory memory;
    float* deltas = static_cast<float*>(memory.get(kTileRows * p.taps * p.groups * sizeof(float)));
    for (int64_t row = begin, n = 0; row < end; row += n) {
      const int64_t at = (row - begin) % kTileRows, place = row % p.block;
      if (at == 0) widen<T>(p, row, std::min(kTileRows, end - row), deltas);
      n = std::min({kTileRows - at, p.block - place, end - row, int64_t{2}});
      const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride;
      T* out = static_cast<T*>(p.out.data) + row * p.out.stride;
      const float* delta = deltas + at * p.taps * p.groups;
      if (pairs)
        (n == 2 ? place ? convolve_pairs<T, 2, false> : convolve_pairs<T, 2, true>
                : place ? convolve_pairs<T, 1, false> : convolve_pairs<T, 1, true>)(p, x, delta, out);
      else
        for (int64_t i = 0; i < n; ++i)
          convolve<T, R>(p, x + i * p.x.stride, std::min(place + i + 1, p.taps), delta + i * p.taps * p.groups,
                         out + i * p.out.stride);
      if (!p.residual.data) continue;
      for (int64_t i = row; i < row + n; ++i, out += p.out.stride)
        norm_row(out, static_cast<const T*>(p.residual.data) + i * p.residual.stride,
                 static_cast<T*>(p.residual_out.data) + i * p.residual_out.stride, static_cast<const T*>(p.weight),
                 out, p.width, p.eps);
    }
  });
}

template <class T>
void run(const GroupedConvParams& p) {
  switch (p.rounding) {
    case ConvRounding::end: return run_rounding<T, ConvRounding::end>(p);
    case ConvRounding::reference: return run_rounding<T, ConvRounding::reference>(p);
    case ConvRounding::engine: return run_rounding<T, ConvRounding::engine>(p);
  }
}

}  // namespace

void grouped_conv(const GroupedConvParams& p) {
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
