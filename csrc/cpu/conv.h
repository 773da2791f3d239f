#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// By their numbers in the schemas: dflash_kernels/ops/conv.py.
enum class ConvRounding : int32_t { end, reference, engine };

// y[i, c] = sum_t (base[t, c] + delta[i, t, c / (width / groups)]) * x[i - t, c], over the t with i - t in i's block of
// `block` rows. out = y, or with a residual out = rms_norm(h) and residual_out = h = round(y + residual).
struct GroupedConvParams {
  ConstRows x, delta;  // delta's row: taps, delta_tap elements apart, of `groups` numbers
  int64_t delta_tap;
  const void* base;
  Rows out;
  ConstRows residual;  // data == nullptr: none
  Rows residual_out;
  const void* weight;
  int64_t rows, width, block, taps, groups;
  float eps;
  ConvRounding rounding;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(grouped_conv, GroupedConvParams)
