#include "bindings/cache.h"
#include "cpu/attention.h"

namespace dflash {
namespace {

void strides(const Tensor& t, int64_t (&to)[3]) {
  for (int i = 0; i < 3; ++i) to[i] = t.stride(i);
}

// Far beyond any position, and small enough that adding positions to it cannot overflow.
int64_t window_side(int64_t side) { return side < (int64_t{1} << 40) ? side : -1; }

void block_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_cache,
                     const std::optional<Tensor>& v_cache, const std::optional<Tensor>& k_scale,
                     const std::optional<Tensor>& v_scale, const std::optional<Tensor>& page_table,
                     const Tensor& context_lens, const std::optional<Tensor>& block_lens,
                     const std::optional<Tensor>& context_starts, const std::optional<Tensor>& block_starts,
                     int64_t max_block, double scale, bool causal, int64_t left, int64_t right,
                     const std::optional<Tensor>& sinks, double softcap, const Tensor& out) {
  AttentionParams p{};
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.out = out.data_ptr();
  strides(q, p.q_stride);
  strides(k, p.k_stride);
  strides(v, p.v_stride);
  strides(out, p.out_stride);
  if (k_cache) {
    p.k_cache = k_cache->data_ptr();
    p.v_cache = v_cache->data_ptr();
    strides(*k_cache, p.k_cache_stride);
    strides(*v_cache, p.v_cache_stride);
    p.fp8_cache = is_fp8(*k_cache);
    p.k_scale = cache_scale(k_scale);
    p.v_scale = cache_scale(v_scale);
    p.num_pages = k_cache->size(0);
    p.page_size = k_cache->size(1);
    p.page_table = data<int32_t>(page_table);
    p.page_table_stride = page_table->stride(0);
    p.max_pages = page_table->size(1);
  }
  p.context_lens = data<int32_t>(context_lens);
  p.block_lens = data<int32_t>(block_lens);
  p.context_starts = data<int32_t>(context_starts);
  p.block_starts = data<int32_t>(block_starts);
  p.sinks = sinks ? sinks->data_ptr() : nullptr;
  p.sink_dtype = sinks ? dtype_of(*sinks, "block_attention: sinks") : Dtype::f32;
  p.batch = context_lens.size(0);
  p.width = max_block;
  p.packed_rows = q.size(1);
  p.heads = q.size(2);
  p.kv_heads = k.size(2);
  p.head_dim = q.size(3);
  p.left = window_side(left);
  p.right = window_side(right);
  p.causal = causal;
  p.scale = float(scale);
  p.softcap = float(softcap);
  p.dtype = dtype_of(q, "block_attention: q");
  launch(block_attention_kernels, p,
         {q, k, v, k_cache, v_cache, k_scale, v_scale, page_table, context_lens, block_lens, context_starts,
          block_starts, sinks, out});
}

DFLASH_CPU_OPS(m) { m.impl("block_attention", TORCH_BOX(&block_attention)); }

}  // namespace
}  // namespace dflash
