#include "bindings/host.h"
#include "cpu/activation.h"

namespace dflash {
namespace {

void silu_and_mul(const Tensor& x, const Tensor& out) {
  const SiluAndMulParams p{{x.data_ptr(), x.stride(0)}, {out.data_ptr(), out.stride(0)}, out.size(0), out.size(1),
                           dtype_of(x, "silu_and_mul: x")};
  launch(silu_and_mul_kernels, p, {x, out});
}

DFLASH_CPU_OPS(m) { m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul)); }

}  // namespace
}  // namespace dflash
