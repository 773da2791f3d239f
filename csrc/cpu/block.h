#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// An embedding table's rows, in bytes: a gather does not care what the elements are, unless they are packed in blocks
// (quant.h) and become elements of `dtype`.
struct TableRows {
  const char* data;  // null: no table
  int64_t stride, rows, width;  // width: of a row that is written
  Format format;
  Dtype dtype;
  int64_t pieces;
};

struct EmbedTokensParams {
  const int64_t* ids;
  int64_t ids_stride;
  TableRows table;
  char* out;
  int64_t out_outer_stride, out_stride;  // bytes
  int64_t outer, inner;
};

// ids = [anchor, MASK...], positions = context_len + i, slots through the page table, rows of the embedding.
struct PrepareBlockParams {
  const int64_t* anchor_ids;
  int64_t anchor_stride;
  const int32_t* context_lens;
  const int32_t* block_lens;  // null: every block is full
  const int32_t* page_table;
  int64_t page_table_stride, max_pages, page_size;
  TableRows embedding;
  int64_t mask_token_id;
  int64_t* ids;
  int64_t ids_stride;
  int64_t* positions;
  int64_t positions_stride;
  int64_t* slots;  // null: none wanted
  int64_t slots_stride;
  char* rows;
  int64_t rows_outer_stride, rows_stride;  // bytes
  int64_t requests, block;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(embed_tokens, EmbedTokensParams)
DFLASH_DECLARE_KERNEL(prepare_block, PrepareBlockParams)
