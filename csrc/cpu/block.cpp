#include "cpu/block.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/quant.h"

namespace dflash::DFLASH_ISA {
namespace {

inline void gather(const TableRows& table, int64_t id, char* out) {
  if (id < 0 || id >= table.rows)
    std::memset(out, 0, size_t(table.width));
  else if (table.format != Format::none)
    quant_row({table.format, reinterpret_cast<const uint8_t*>(table.data), id, table.pieces, table.dtype, out});
  else
    std::memcpy(out, table.data + id * table.stride, size_t(table.width));
}

// The cache slot of a live token, or -1 where its request owns no page: never a slot in someone else's page.
inline int64_t slot_of(const PrepareBlockParams& p, int64_t request, int64_t position) {
  if (position < 0) return -1;
  const int64_t index = position / p.page_size;
  if (index >= p.max_pages) return -1;
  const int64_t page = p.page_table[request * p.page_table_stride + index];
  return page < 0 ? -1 : page * p.page_size + position % p.page_size;
}

void prepare_token(const PrepareBlockParams& p, int64_t b, int64_t i) {
  const bool live = !p.block_lens || i < p.block_lens[b];
  const int64_t id = live && i == 0 ? p.anchor_ids[b * p.anchor_stride] : p.mask_token_id;
  const int64_t position = live ? p.context_lens[b] + i : 0;
  p.ids[b * p.ids_stride + i] = id;
  p.positions[b * p.positions_stride + i] = position;
  if (p.slots) p.slots[b * p.slots_stride + i] = live ? slot_of(p, b, position) : -1;
  if (p.rows) gather(p.embedding, live ? id : -1, p.rows + b * p.rows_outer_stride + i * p.rows_stride);
}

// Few tokens are not worth waking another thread for.
inline int64_t grain(int64_t row_bytes) { return 1 + 65536 / (row_bytes + 64); }

}  // namespace

void prepare_block(const PrepareBlockParams& p) {
  parallel_for(p.requests * p.block, grain(p.rows ? p.embedding.width : 0), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) prepare_token(p, t / p.block, t % p.block);
  });
}

void embed_tokens(const EmbedTokensParams& p) {
  if (p.table.width == 0) return;
  parallel_for(p.outer * p.inner, grain(p.table.width), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t r = t / p.inner, i = t % p.inner;
      gather(p.table, p.ids[r * p.ids_stride + i], p.out + r * p.out_outer_stride + i * p.out_stride);
    }
  });
}

}  // namespace dflash::DFLASH_ISA
