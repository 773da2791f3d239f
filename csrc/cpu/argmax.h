// torch.argmax's order: NaN above everything, then the larger value, then the lower index.
#pragma once

#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

struct Best {
  float value;
  int64_t index;
};

inline bool wins(Best a, Best over) {
  if (is_nan(over.value)) return is_nan(a.value) && a.index < over.index;
  return is_nan(a.value) || a.value > over.value || (a.value == over.value && a.index < over.index);
}

// best[0 ... k) is in that order, and stays so with `found` in it where it is among the k first. Says whether it is.
inline bool insert(Best* best, int64_t k, Best found) {
  int64_t at = k;
  for (; at > 0 && wins(found, best[at - 1]); --at)
    if (at < k) best[at] = best[at - 1];
  if (at < k) best[at] = found;
  return at < k;
}

template <class T>
Best first_in(const T* x, int64_t begin, int64_t end) {
  Best best{to_float(x[begin]), begin};
  for (int64_t i = begin + 1; i < end; ++i)
    if (const Best found{to_float(x[i]), i}; wins(found, best)) best = found;
  return best;
}

// Whole blocks are only reduced to their maximum and whether they hold a NaN, and the one block that wins is searched
// for its first index.
template <class T>
int64_t argmax(const T* x, int64_t n) {
  constexpr int64_t kBlock = 32 * Vec::W;
  Best best{to_float(x[0]), 0};
  int64_t winner = -1, i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    Vec top0 = set1(-INFINITY), top1 = top0, nan = set1(0.0f);
    for (int64_t j = i; j < i + kBlock; j += 2 * Vec::W) {
      const Vec a = load(x + j), b = load(x + j + Vec::W);
      nan = select_nan(a + b, set1(1.0f), nan);  // also inf - inf, which the search below sorts out
      top0 = vmax(a, top0);
      top1 = vmax(b, top1);
    }
    if (reduce_add(nan) > 0.0f) {
      const Best found = first_in(x, i, i + kBlock);
      if (is_nan(found.value)) return found.index;
    }
    float lanes[Vec::W];
    store(lanes, vmax(top0, top1));
    for (int l = 0; l < Vec::W; ++l)
      if (lanes[l] > best.value) {
        best.value = lanes[l];
        winner = i;
      }
  }
  if (winner >= 0) best = first_in(x, winner, winner + kBlock);
  if (i == n) return best.index;
  const Best tail = first_in(x, i, n);
  return wins(tail, best) ? tail.index : best.index;
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
