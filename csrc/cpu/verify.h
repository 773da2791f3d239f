#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// The drafted blocks that a verification is asked about, and where it says what became of them.
struct DraftedBlocks {
  const int64_t* draft_ids;
  int64_t draft_stride;
  const int32_t* context_lens;
  const int32_t* block_lens;  // null: every block is full
  int32_t* accept_lens;
  int32_t* commit_lens;
  int64_t* tokens;
  int64_t tokens_stride;
  int64_t* bonus;
  int32_t* new_lens;
  int64_t requests, block;
};

// Longest agreeing prefix of each block. The target's ids are given, or are the argmax of `logits` rows.
struct VerifyGreedyParams : DraftedBlocks {
  const int64_t* target_ids;  // null: from logits
  int64_t target_stride;
  const void* logits;
  int64_t logits_outer_stride, logits_stride, vocab;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(verify_greedy, VerifyGreedyParams)
