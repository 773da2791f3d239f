#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// The k largest of score + bias in each row, and their scores as weights.
struct RouteExpertsParams {
  ConstRows logits;   // (rows, experts)
  const float* bias;  // (experts,) or null
  int64_t rows, experts, k, groups, top_groups, group_best;
  bool sigmoid, normalize;
  float scale;
  int32_t* out_ids;    // (rows, k)
  float* out_weights;  // (rows, k)
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(route_experts, RouteExpertsParams)
