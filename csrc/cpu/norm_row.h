// One row of rms_norm and add_rms_norm.
#pragma once

#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

// The lanes of a vector that is known to be whole when this is compiled.
struct Whole {};
template <class T> inline Vec load_n(const T* p, Whole) { return load(p); }
template <class T> inline void store_n(T* p, Vec x, Whole) { store(p, x); }

// Calls f(i, n) for the vectors of [begin, end): n is Whole, or the number of the last one's lanes.
template <class F>
inline void each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + Vec::W <= end; i += Vec::W) f(i, Whole{});
  if (i < end) f(i, int(end - i));
}

// out = norm(h) * weight with h = x, or h = round(x + residual), which goes to sum. out can be x.
template <class T>
void norm_row(const T* x, const T* residual, T* sum, const T* weight, T* out, int64_t width, float eps) {
  Vec squares = set1(0.0f);
  each_vector(0, width, [&](int64_t i, auto n) {
    Vec h = load_n(x + i, n);
    if (residual) {
      store_n(sum + i, h + load_n(residual + i, n), n);
      h = load_n(sum + i, n);
    }
    squares = fma(h, h, squares);
  });
  const T* h = residual ? sum : x;
  const Vec scale = set1(1.0f / std::sqrt(reduce_add(squares) / float(width) + eps));
  each_vector(0, width, [&](int64_t i, auto n) {
    store_n(out + i, load_n(h + i, n) * scale * load_n(weight + i, n), n);
  });
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
