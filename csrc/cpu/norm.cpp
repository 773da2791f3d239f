#include "cpu/norm.h"

#include "cpu/norm_row.h"
#include "cpu/parallel.h"

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
void run(const RmsNormParams& p) {
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t grain = 1 + kGrainElements / (p.width + 1);
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      norm_row(static_cast<const T*>(p.x.data) + t * p.x.stride,
               p.residual.data ? static_cast<const T*>(p.residual.data) + t * p.residual.stride : nullptr,
               static_cast<T*>(p.residual_out.data) + t * p.residual_out.stride, weight,
               static_cast<T*>(p.out.data) + t * p.out.stride, p.width, p.eps);
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
