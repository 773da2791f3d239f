// The activation of gated MLPs.
#pragma once

#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

// x / (1 + exp(-x)). A NaN comes through by the division, and an exponential below the range is nothing beside 1.
inline Vec silu(Vec x) {
  const Vec hi = set1(88.72283f), y = set1(0.0f) - x;
  const Vec e = exp_within(vmin(vmax(y, set1(kLowestExp)), hi));
  return x / (set1(1.0f) + select_lt(hi, y, set1(INFINITY), e));
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
