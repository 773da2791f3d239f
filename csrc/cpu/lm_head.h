#pragma once

#include "cpu/gemm_params.h"
#include "cpu/isa.h"

namespace dflash {

// logit(r, v) = round(cap * tanh(scale * (x W^T + bias) / cap)), v < num_valid.
struct LogitParams {
  GemmParams gemm;
  int64_t num_valid;
  float scale, softcap;  // softcap 0: none
};

// ids[r] = argmax_v logit(r, v) + id_offset, values[r] = that logit.
struct LmHeadArgmaxParams {
  LogitParams logits;
  int64_t id_offset;
  int64_t* ids;
  float* values;
};

// ids[r], values[r] = the winner of row r among shards' winners, which lie (shards, rows) one after the other.
struct CombineArgmaxParams {
  const float* values;
  const int64_t* ids;
  int64_t shards, rows;
  int64_t* out_ids;
  float* out_values;
};

// The k first of each row in the order of argmax, ids and values (rows, k), and lse[r] = log sum_v exp(logit(r, v)).
struct LmHeadTopkParams {
  LogitParams logits;
  int64_t id_offset, k;
  int64_t* ids;
  float *values, *lse;
};

// The same from those of shards, which lie (shards, rows, k) and (shards, rows).
struct CombineTopkParams {
  const float* values;
  const int64_t* ids;
  const float* lse;
  int64_t shards, rows, k;
  int64_t* out_ids;
  float *out_values, *out_lse;
};

}  // namespace dflash

DFLASH_DECLARE_DOT_KERNEL(lm_head_argmax, LmHeadArgmaxParams)
DFLASH_DECLARE_DOT_KERNEL(combine_argmax, CombineArgmaxParams)
DFLASH_DECLARE_DOT_KERNEL(lm_head_topk, LmHeadTopkParams)
DFLASH_DECLARE_DOT_KERNEL(combine_topk, CombineTopkParams)
