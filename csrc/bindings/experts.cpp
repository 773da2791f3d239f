#include "cpu/experts.h"

#include "bindings/host.h"

namespace dflash {
namespace {

using Maybe = std::optional<Tensor>;

ExpertWeights weights_of(const Tensor& weight, const Maybe& scales, const Maybe& bias, int64_t n, int64_t k) {
  return {weight.data_ptr(), data<const float>(scales), bias ? bias->data_ptr() : nullptr, n, k, weight.dim() > 3};
}

void expert_mlp(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Maybe& gate_up_scales,
                const Maybe& down_scales, const Tensor& ids, const Tensor& weights, const Maybe& gate_up_bias,
                const Maybe& down_bias, int64_t inner, int64_t activation, int64_t first_expert, const Tensor& out) {
  const int64_t hidden = x.size(1);
  const ExpertMlpParams p{{x.data_ptr(), x.stride(0)},
                          weights_of(gate_up, gate_up_scales, gate_up_bias, 2 * inner, hidden),
                          weights_of(down, down_scales, down_bias, hidden, inner),
                          data<const int32_t>(ids),
                          data<const float>(weights),
                          x.size(0),
                          ids.size(1),
                          gate_up.size(0),
                          first_expert,
                          activation == 1,
                          {out.data_ptr(), out.stride(0)},
                          dtype_of(x, "expert_mlp: x")};
  launch(expert_mlp_kernels, p,
         {x, gate_up, down, gate_up_scales, down_scales, ids, weights, gate_up_bias, down_bias, out});
}

DFLASH_CPU_OPS(m) { m.impl("expert_mlp", TORCH_BOX(&expert_mlp)); }

}  // namespace
}  // namespace dflash
