#include "bindings/context.h"

#include "cpu/context.h"

namespace dflash {
namespace {

void write_context_kv(const Tensor& kv, const Tensor& positions, const Tensor& slots, std::vector<Tensor> k_caches,
                      std::vector<Tensor> v_caches, std::vector<Tensor> k_scales, std::vector<Tensor> v_scales,
                      const std::optional<Tensor>& k_weights, const std::optional<Tensor>& cos_sin,
                      const std::optional<Tensor>& commit_lens, double eps, double v_scale, bool interleaved,
                      bool round_each) {
  const auto p = context_params(kv, positions, slots, k_caches, v_caches, k_scales, v_scales, k_weights, cos_sin,
                                commit_lens, eps, v_scale, interleaved, round_each);
  for (const auto* more : {&v_caches, &k_scales, &v_scales})
    k_caches.insert(k_caches.end(), more->begin(), more->end());
  launch(write_context_kv_kernels, p, {kv, positions, slots, k_weights, cos_sin, commit_lens}, k_caches);
}

DFLASH_CPU_OPS(m) { m.impl("write_context_kv", TORCH_BOX(&write_context_kv)); }

}  // namespace
}  // namespace dflash
