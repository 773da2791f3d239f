#pragma once

#include "cpu/sample.h"

namespace dflash {

// score[l, c] = values[l, c] + round(sum_r round(predecessor[before, r] * hidden[l, r]) * successor[ids[l, c], r]), and
// one candidate of each slot l by them, which is `before` of the next slot.
struct SelectCandidatesParams {
  const float* values;
  const int64_t* ids;  // (requests, slots, candidates), as values
  const void* hidden;  // (requests, slots, rank); null: ones
  const int64_t* anchors;
  int64_t anchor_stride;
  const void *predecessor, *successor;  // (vocab, rank)
  const int32_t* context_lens;
  SamplingRecord sampling;  // temperature null: all requests are greedy
  int64_t* out_ids;
  int64_t out_stride;
  float* out_logprobs;
  float* out_probs;  // null without temperature
  int64_t requests, slots, candidates, rank, vocab;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(select_candidates, SelectCandidatesParams)
