// What every verification does with a drafted block around its own decision.
#pragma once

#include "cpu/verify.h"

namespace dflash::DFLASH_ISA {
namespace {

inline int64_t width_of(const DraftedBlocks& p, int64_t b) {
  return p.block_lens && p.block_lens[b] < p.block ? p.block_lens[b] : p.block;
}

// Request b commits the first `count` of its tokens, which are in place already; the last of them is `last`.
inline void commit_block(const DraftedBlocks& p, int64_t b, int64_t count, int64_t last) {
  for (int64_t i = count; i < p.block; ++i) p.tokens[b * p.tokens_stride + i] = -1;
  p.accept_lens[b] = int32_t(count > 0 ? count - 1 : 0);
  p.commit_lens[b] = int32_t(count);
  p.bonus[b] = last;
  p.new_lens[b] = int32_t(uint32_t(p.context_lens[b]) + uint32_t(count));  // any length may come; it wraps
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
