#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// Strides are in elements; the last dimension is contiguous everywhere.
struct AttentionParams {
  const void *q, *k, *v;
  void* out;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // request, row, head
  const void *k_cache, *v_cache;                                 // nullptr: no context keys
  int64_t k_cache_stride[3], v_cache_stride[3];                  // page, row, head
  bool fp8_cache;                                                // else of dtype
  CacheScale k_scale, v_scale;
  int64_t num_pages, page_size;
  const int32_t* page_table;
  int64_t page_table_stride, max_pages;
  const int32_t *context_lens, *block_lens, *context_starts;  // the last two may be nullptr
  // Of packed blocks, or nullptr: request b's rows begin at row block_starts[b] of packed_rows.
  const int32_t* block_starts;
  int64_t packed_rows;
  const void* sinks;                                          // (heads,) or nullptr
  Dtype sink_dtype;
  int64_t batch, width, heads, kv_heads, head_dim;
  int64_t left, right;  // -1: unlimited
  bool causal;
  float scale, softcap;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_DOT_KERNEL(block_attention, AttentionParams)
