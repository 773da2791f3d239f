#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// One of the two weights of E experts, (n, k) each.
struct ExpertWeights {
  const void* data;     // packed, one after another, or row-major
  const float* scales;  // (E, n), of int8 weights, which are packed; null: the weights are of the rows' dtype
  const void* bias;     // (E, n) or null
  int64_t n, k;
  bool packed;
};

// out[row] = sum over slots of weights[row, slot] * (act(x gate_up^T) down^T), slot 0 first.
struct ExpertMlpParams {
  ConstRows x;
  ExpertWeights gate_up, down;
  const int32_t* ids;    // (rows, slots); outside [first_expert, first_expert + experts): adds nothing
  const float* weights;  // (rows, slots)
  int64_t rows, slots, experts, first_expert;
  bool clamped;  // the activation
  Rows out;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_DOT_KERNEL(expert_mlp, ExpertMlpParams)
