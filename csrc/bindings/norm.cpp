#include "bindings/host.h"
#include "cpu/norm.h"

namespace dflash {
namespace {

ConstRows rows(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }
Rows mutable_rows(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  const RmsNormParams p{rows(x),    {nullptr, 0}, {nullptr, 0}, weight.data_ptr(), mutable_rows(out),
                        x.size(0), x.size(1),    float(eps),   dtype_of(x, "rms_norm: x")};
  launch(rms_norm_kernels, p, {x, weight, out});
}

void add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& out,
                  const std::optional<Tensor>& residual_out) {
  const RmsNormParams p{rows(x),           rows(residual),
                        mutable_rows(residual_out ? *residual_out : residual),
                        weight.data_ptr(), mutable_rows(out),
                        x.size(0),         x.size(1),
                        float(eps),        dtype_of(x, "add_rms_norm: x")};
  launch(rms_norm_kernels, p, {x, residual, weight, out, residual_out});
}

DFLASH_CPU_OPS(m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}

}  // namespace
}  // namespace dflash
