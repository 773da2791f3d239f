// The arguments of write_context_kv as its kernels take them, on any device.
#pragma once

#include "bindings/cache.h"
#include "params/context.h"

namespace dflash {

inline WriteContextKvParams context_params(const Tensor& kv, const Tensor& positions, const Tensor& slots,
                                           const std::vector<Tensor>& k_caches, const std::vector<Tensor>& v_caches,
                                           const std::vector<Tensor>& k_scales, const std::vector<Tensor>& v_scales,
                                           const std::optional<Tensor>& k_weights,
                                           const std::optional<Tensor>& cos_sin,
                                           const std::optional<Tensor>& commit_lens, double eps, double v_scale,
                                           bool interleaved, bool round_each) {
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
    if (!k_scales.empty()) p.k_scales[layer] = data<const float>(k_scales[layer]);
    if (!v_scales.empty()) p.v_scales[layer] = data<const float>(v_scales[layer]);
  }
  p.k_scale_head = k_scales.empty() ? 0 : cache_scale(k_scales[0]).head;
  p.v_scale_head = v_scales.empty() ? 0 : cache_scale(v_scales[0]).head;
  return p;
}

}  // namespace dflash
