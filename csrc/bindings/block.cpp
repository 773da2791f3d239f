#include "cpu/block.h"
#include "cpu/quant.h"

#include "bindings/host.h"

namespace dflash {
namespace {

using Maybe = std::optional<Tensor>;

// A packed table has 16 rows in each of its own.
TableRows table_rows(const Tensor& t, int64_t format, const Tensor& out) {
  const int64_t size = t.element_size();
  if (!format) return {data<const char>(t), t.stride(0) * size, t.size(0), t.size(1) * size, Format::none, {}, 0};
  const int64_t width = out.size(out.dim() - 1);
  return {data<const char>(t),         0, t.size(0) * kPieceOutputs, width * int64_t(out.element_size()),
          static_cast<Format>(format), dtype_of(out, "out"), width / kPiece};
}

void embed_tokens(const Tensor& ids, const Tensor& table, int64_t format, const Tensor& out) {
  const int64_t size = out.element_size();
  const EmbedTokensParams p{data<const int64_t>(ids), ids.stride(0),
                            table_rows(table, format, out), data<char>(out),
                            out.stride(0) * size, out.stride(1) * size,
                            ids.size(0), ids.size(1)};
  launch(embed_tokens_kernels, p, {ids, table, out});
}

void prepare_block(const Tensor& anchor_ids, const Tensor& context_lens, int64_t mask_token_id, const Maybe& page_table,
                   int64_t page_size, const Maybe& block_lens, const Maybe& embedding, int64_t format,
                   const Tensor& ids, const Tensor& positions, const Maybe& slots, const Maybe& rows) {
  PrepareBlockParams p{};
  p.anchor_ids = data<const int64_t>(anchor_ids);
  p.anchor_stride = anchor_ids.stride(0);
  p.context_lens = data<const int32_t>(context_lens);
  p.block_lens = data<const int32_t>(block_lens);
  p.page_size = page_size;
  if (page_table) {
    p.page_table = data<const int32_t>(page_table);
    p.page_table_stride = page_table->stride(0);
    p.max_pages = page_table->size(1);
  }
  p.mask_token_id = mask_token_id;
  p.ids = data<int64_t>(ids);
  p.ids_stride = ids.stride(0);
  p.positions = data<int64_t>(positions);
  p.positions_stride = positions.stride(0);
  if (slots) {
    p.slots = data<int64_t>(slots);
    p.slots_stride = slots->stride(0);
  }
  if (rows && embedding) {
    p.embedding = table_rows(*embedding, format, *rows);
    p.rows = data<char>(rows);
    p.rows_outer_stride = rows->stride(0) * rows->element_size();
    p.rows_stride = rows->stride(1) * rows->element_size();
  }
  p.requests = ids.size(0);
  p.block = ids.size(1);
  launch(prepare_block_kernels, p,
         {anchor_ids, context_lens, page_table, block_lens, embedding, ids, positions, slots, rows});
}

DFLASH_CPU_OPS(m) {
  m.impl("embed_tokens", TORCH_BOX(&embed_tokens));
  m.impl("prepare_block", TORCH_BOX(&prepare_block));
}

}  // namespace
}  // namespace dflash
