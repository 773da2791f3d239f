#include "cpu/router.h"

#include "bindings/host.h"

namespace dflash {
namespace {

void route_experts(const Tensor& logits, const std::optional<Tensor>& bias, int64_t scoring, int64_t groups,
                   int64_t top_groups, int64_t group_best, bool normalize, double scale, const Tensor& out_ids,
                   const Tensor& out_weights) {
  const RouteExpertsParams p{{logits.data_ptr(), logits.stride(0)},
                             data<const float>(bias),
                             logits.size(0),
                             logits.size(1),
                             out_ids.size(1),
                             groups,
                             top_groups,
                             group_best,
                             scoring == 1,
                             normalize,
                             float(scale),
                             data<int32_t>(out_ids),
                             data<float>(out_weights),
                             dtype_of(logits, "route_experts: logits")};
  launch(route_experts_kernels, p, {logits, bias, out_ids, out_weights});
}

DFLASH_CPU_OPS(m) { m.impl("route_experts", TORCH_BOX(&route_experts)); }

}  // namespace
}  // namespace dflash
