// grouped_conv: T rows of H elements are read and written once, taps * G numbers a row and the base kernel are read:
// e * (2 T H + taps (T G + H)) bytes. With the addition and the norm, e * (2 T H + H) more. The floor is that over the
// bandwidth of memory. Two taps are 4 multiply-adds an element.
//
// Rows are computed one after the other: the rows of a row's other taps and the base kernel are in the cache then, and
// the row after it is asked for. With the norm, out's own memory keeps the result until it is normed. What is left to
// save are conversions: bfloat16 rows are taken apart into elements of even and of odd place, which needs one
// instruction for each, and put together likewise (Pair). Coefficients of a few rows become float32 first, to be
// broadcast from memory.
//
// acc = fma(delta, x, fma(base, x, acc)): products of 16-bit numbers are exact, so that fusing changes nothing, and
// every instruction set has the same bits.
#include "cpu/conv.h"

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

// The same for one or two taps, rounded once, and groups that fill pairs, or half pairs.
template <class T, int Taps>
void convolve_pairs(const GroupedConvParams& p, const T* x, const float* delta, T* out) {
  using P = Pair<T>;
  const T* base = static_cast<const T*>(p.base);
  const int64_t groups = p.groups, group = p.width / groups, width = p.width, before = p.x.stride;
  const P zero{set1(0.0f), set1(0.0f)};
  const auto pair = [&](int64_t c, P d0, P d1) {
    prefetch(x + before + c);
    const P now = P::load(x + c);
    P acc = fma(d0, now, fma(P::load(base + c), now, zero));
    if constexpr (Taps == 2) {
      const P then = P::load(x - before + c);
      acc = fma(d1, then, fma(P::load(base + width + c), then, acc));
    }
    acc.store(out + c);
  };
  const float* delta1 = delta + (Taps - 1) * groups;
  if (group < P::kSize)
    for (int64_t g = 0, c = 0; g < groups; g += 2, c += P::kSize) pair(c, P::halves(delta + g), P::halves(delta1 + g));
  else
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = g * group; c < (g + 1) * group; c += P::kSize)
        pair(c, {set1(delta[g]), set1(delta[g])}, {set1(delta1[g]), set1(delta1[g])});
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
  const bool pairs = R == ConvRounding::end && p.taps <= 2 &&
                     (group % Pair<T>::kSize == 0 || (2 * group == Pair<T>::kSize && p.groups % 2 == 0));
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
    static thread_local ThreadMemory memory;
    float* deltas = static_cast<float*>(memory.get(kTileRows * p.taps * p.groups * sizeof(float)));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = (row - begin) % kTileRows, place = row % p.block;
      if (at == 0) widen<T>(p, row, end - row < kTileRows ? end - row : kTileRows, deltas);
      const int64_t taps = place + 1 < p.taps ? place + 1 : p.taps;
      const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride;
      T* out = static_cast<T*>(p.out.data) + row * p.out.stride;
      const float* delta = deltas + at * p.taps * p.groups;
      if (!pairs)
        convolve<T, R>(p, x, taps, delta, out);
      else if (taps == 1)
        convolve_pairs<T, 1>(p, x, delta, out);
      else
        convolve_pairs<T, 2>(p, x, delta, out);
      if (p.residual.data)
        norm_row(out, static_cast<const T*>(p.residual.data) + row * p.residual.stride,
                 static_cast<T*>(p.residual_out.data) + row * p.residual_out.stride, static_cast<const T*>(p.weight),
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
