#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// out[t, i] = silu(x[t, i]) * x[t, width + i]; out may be the first half of x.
struct SiluAndMulParams {
  ConstRows x;
  Rows out;
  int64_t rows, width;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(silu_and_mul, SiluAndMulParams)
