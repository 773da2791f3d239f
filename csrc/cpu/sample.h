#pragma once

#include "cpu/verify.h"

namespace dflash {

// As in dflash_kernels/_constants.py.
constexpr int kSampleChunk = 1024;  // tokens of the vocabulary that share a partial sum
constexpr int kChunkSums = 4, kRowStats = 16;  // floats of the workspace for a chunk, and for a row beside its chunks

// How each request draws; a null array is off for everyone.
struct SamplingRecord {
  const float* temperature;
  const int64_t* seeds;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
};

// A (requests, rows, n) tensor, its last dimension contiguous.
struct Blocks {
  const void* data;
  int64_t outer, inner;  // strides in elements
};

struct VerifySampleParams : DraftedBlocks {
  Blocks logits;
  Dtype dtype;
  int64_t vocab;
  SamplingRecord sampling;
  Blocks draft_probs, draft_candidates, draft_logits;  // data null: not that form
  int64_t candidates;
  Dtype draft_dtype;
  Blocks seen, bias, bitmask;  // data null: none
  const float* repetition_penalty;
  bool block_rule;
  float* workspace;
};

// Draws from `candidates` values each; rows = requests * slots.
struct SampleDraftParams {
  const float* values;
  const int64_t* ids;
  const int32_t* context_lens;
  SamplingRecord sampling;
  int64_t* out_ids;
  int64_t out_stride;
  float* out_probs;
  int64_t requests, slots, candidates;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(verify_sample, VerifySampleParams)
DFLASH_DECLARE_KERNEL(sample_draft, SampleDraftParams)
