#include "cpu/context.h"

#include "bindings/cache.h"

namespace dflash {
namespace {

void write_context_kv(const Tensor& kv, const Tensor& positions, const Tensor& slots, std::vector<Tensor> k_caches,
                      std::vector<Tensor> v_caches, const std::optional<Tensor>& k_weights,
                      const std::optional<Tensor>& cos_sin, const std::optional<Tensor>& commit_lens, double eps,
                      double v_scale, bool interleaved, bool round_each) {
  WriteContextKvParams p{};
  p.kv = {kv.data_ptr(), kv.stride(0)};
  p.positions = data<const int64_t>(positions);
  p.slots = data<const int64_t>(slots);
  p.slots_layer_stride = slots.dim() == 2 ? slots.stride(0) : 0;
  p.commit_lens = data<const int32_t>(commit_lens);
  p.k_weights = dflash::data<void>(k_weights);
  p.table = rotary_table(cos_sin, interleaved, round_each);
  p.cache = cache_view(k_caches[0], v_caches[0]);
  p.tokens = kv.size(0);
  p.requests = commit_lens ? commit_lens->size(0) : 0;
  p.layers = int64_t(k_caches.size());
  p.num_kv_heads = k_caches[0].size(2);
  p.head_dim = k_caches[0].size(3);
  p.eps = float(eps);
  p.v_scale = float(v_scale);
  p.dtype = dtype_of(kv, "write_context_kv: kv");
  STD_TORCH_CHECK(p.layers <= kMaxLayers, "write_context_kv: caches must be at most ", kMaxLayers, " layers");
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    p.k_caches[layer] = k_caches[layer].data_ptr();
    p.v_caches[layer] = v_caches[layer].data_ptr();
  }
  k_caches.insert(k_caches.end(), v_caches.begin(), v_caches.end());
  launch(write_context_kv_kernels, p, {kv, positions, slots, k_weights, cos_sin, commit_lens}, k_caches);
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) { m.impl("write_context_kv", TORCH_BOX(&write_context_kv)); }

}  // namespace
}  // namespace dflash
