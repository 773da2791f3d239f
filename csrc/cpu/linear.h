#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// out = x W^T + bias, float32 sums, one rounding.
struct LinearParams {
  ConstRows x;
  int64_t rows, K, N;
  const void* weight;
  int64_t weight_stride;  // 0: packed
  const void* bias;
  Rows out;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_BF16_KERNEL(linear, LinearParams)
