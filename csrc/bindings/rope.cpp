#include "cpu/rope.h"

#include "bindings/cache.h"

namespace dflash {
namespace {

void qk_norm_rope(const Tensor& qkv, const Tensor& positions, const std::optional<Tensor>& cos_sin,
                  const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                  const std::optional<Tensor>& k_cache, const std::optional<Tensor>& v_cache,
                  const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                  const std::optional<Tensor>& slots, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                  double eps, bool interleaved, bool round_each) {
  QkNormRopeParams p{};
  p.qkv = {qkv.data_ptr(), qkv.stride(0)};
  p.positions = data<const int64_t>(positions);
  p.q_weight = dflash::data<void>(q_weight);
  p.k_weight = dflash::data<void>(k_weight);
  p.table = rotary_table(cos_sin, interleaved, round_each);
  if (k_cache) {
    p.k_cache = k_cache->data_ptr();
    p.v_cache = v_cache->data_ptr();
    p.k_scale = cache_scale(k_scale);
    p.v_scale = cache_scale(v_scale);
    p.slots = data<const int64_t>(slots);
    p.cache = cache_view(*k_cache, *v_cache);
  }
  p.tokens = qkv.size(0);
  p.num_heads = num_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.eps = float(eps);
  p.dtype = dtype_of(qkv, "qk_norm_rope: qkv");
  launch(qk_norm_rope_kernels, p, {qkv, positions, cos_sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale,
                                   slots});
}

DFLASH_CPU_OPS(m) { m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope)); }

}  // namespace
}  // namespace dflash
