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

}  // namespace dflash

DFLASH_DECLARE_BF16_KERNEL(lm_head_argmax, LmHeadArgmaxParams)
