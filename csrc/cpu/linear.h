#pragma once

#include "cpu/gemm_params.h"
#include "cpu/isa.h"

namespace dflash {

// out = x W^T + bias, float32 sums, one rounding.
struct LinearParams {
  GemmParams gemm;
  Rows out;
};

}  // namespace dflash

DFLASH_DECLARE_DOT_KERNEL(linear, LinearParams)
