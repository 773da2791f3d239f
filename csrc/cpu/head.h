#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// ids[r] = argmax_v logit(r, v), values[r] = that logit, with
// logit = round(cap * tanh(scale * (x W^T + bias) / cap)) and v < num_valid.
struct LmHeadArgmaxParams {
  ConstRows x;
  int64_t rows, K, N;
  const void* weight;
  int64_t weight_stride;  // 0: packed
  const void* bias;
  int64_t num_valid;
  float scale, softcap;  // softcap 0: none
  int64_t id_offset;
  int64_t* ids;
  float* values;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_BF16_KERNEL(lm_head_argmax, LmHeadArgmaxParams)
