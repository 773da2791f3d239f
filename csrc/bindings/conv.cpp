#include "bindings/host.h"
#include "cpu/conv.h"

namespace dflash {
namespace {

GroupedConvParams params(const Tensor& x, const Tensor& delta, const Tensor& base, int64_t block, int64_t rounding,
                         const Tensor& out, const char* what) {
  GroupedConvParams p{};
  p.x = {x.data_ptr(), x.stride(0)};
  p.delta = {delta.data_ptr(), delta.stride(0)};
  p.delta_tap = delta.stride(1);
  p.base = base.data_ptr();
  p.out = {out.data_ptr(), out.stride(0)};
  p.rows = x.size(0);
  p.width = x.size(1);
  p.block = block;
  p.taps = delta.size(1);
  p.groups = delta.size(2);
  p.rounding = static_cast<ConvRounding>(rounding);
  p.dtype = dtype_of(x, what);
  return p;
}

void grouped_conv(const Tensor& x, const Tensor& delta, const Tensor& base, int64_t block, int64_t rounding,
                  const Tensor& out) {
  launch(grouped_conv_kernels, params(x, delta, base, block, rounding, out, "grouped_conv: x"), {x, delta, base, out});
}

void grouped_conv_add_rms_norm(const Tensor& x, const Tensor& delta, const Tensor& base, int64_t block,
                               int64_t rounding, const Tensor& residual, const Tensor& weight, double eps,
                               const Tensor& out, const std::optional<Tensor>& residual_out) {
  GroupedConvParams p = params(x, delta, base, block, rounding, out, "grouped_conv_add_rms_norm: x");
  const Tensor& sum = residual_out ? *residual_out : residual;
  p.residual = {residual.data_ptr(), residual.stride(0)};
  p.residual_out = {sum.data_ptr(), sum.stride(0)};
  p.weight = weight.data_ptr();
  p.eps = float(eps);
  launch(grouped_conv_kernels, p, {x, delta, base, residual, weight, out, residual_out});
}

DFLASH_CPU_OPS(m) {
  m.impl("grouped_conv", TORCH_BOX(&grouped_conv));
  m.impl("grouped_conv_add_rms_norm", TORCH_BOX(&grouped_conv_add_rms_norm));
}

}  // namespace
}  // namespace dflash
