#pragma once

#include "cpu/gemm_params.h"
#include "cpu/isa.h"

namespace dflash {

// ids[r] = argmax_v logit(r, v), values[r] = that logit, with
// logit = round(cap * tanh(scale * (x W^T + bias) / cap)) and v < num_valid.
struct LmHeadArgmaxParams {
  GemmParams gemm;
  int64_t num_valid;
  float scale, softcap;  // softcap 0: none
  int64_t id_offset;
  int64_t* ids;
  float* values;
};

// ids[r], values[r] = the winner of row r among shards' winners, which lie (shards, rows) one after the other.
struct MergeArgmaxParams {
  const float* values;
  const int64_t* ids;
  int64_t shards, rows;
  int64_t* out_ids;
  float* out_values;
};

}  // namespace dflash

DFLASH_DECLARE_BF16_KERNEL(lm_head_argmax, LmHeadArgmaxParams)
DFLASH_DECLARE_BF16_KERNEL(merge_argmax, MergeArgmaxParams)
