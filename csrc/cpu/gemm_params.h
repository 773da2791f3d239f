#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// The product x W^T of `rows` rows, and the scales and the bias that the epilogue multiplies by and adds.
struct GemmParams {
  ConstRows x;
  int64_t rows, K, N;
  const void* weight;     // packed, or row-major (N, K) with rows weight_stride apart
  int64_t weight_stride;  // 0 when packed
  const float* scales;    // (N,), of an int8 weight, which is packed; null: the weight is of x's dtype
  const void* bias;       // (N,) or null
  Dtype dtype;
  Format format;  // of a packed weight in blocks (quant.h), whose K is a multiple of 32; none: elements
  bool exact;     // blocks become elements of x's type, and the product is theirs; false: rows of x become int8
  Isa isa;        // whose dot products of int8 are used
};

}  // namespace dflash
