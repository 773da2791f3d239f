#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// out[t] = h[t] * rsqrt(mean(h[t]^2) + eps) * weight, with h = x, or h = round(x + residual) stored to residual_out.
struct RmsNormParams {
  ConstRows x;
  ConstRows residual;      // data == nullptr: plain norm
  Rows residual_out;
  const void* weight;
  Rows out;
  int64_t rows, width;
  float eps;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(rms_norm, RmsNormParams)
