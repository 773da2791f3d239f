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

}  // namespace
}  // namespace dflash::DFLASH_ISA
