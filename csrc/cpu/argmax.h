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

}  // namespace
}  // namespace dflash::DFLASH_ISA
