#include "cpu/norm.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
void norm_row(const T* x, const T* residual, T* sum, const T* weight, T* out, int64_t n, float eps) {
  Vec squares = set1(0.0f);
  for (int64_t i = 0; i < n; i += Vec::W) {
    const int m = int(n - i);
    Vec h = load_n(x + i, m);
    if (residual) {
      store_n(sum + i, h + load_n(residual + i, m), m);
      h = load_n(sum + i, m);
    }
    squares = fma(h, h, squares);
  }
  const T* h = residual ? sum : x;
  const Vec scale = set1(1.0f / std::sqrt(reduce_add(squares) / float(n) + eps));
  for (int64_t i = 0; i < n; i += Vec::W) {
    const int m = int(n - i);
    store_n(out + i, load_n(h + i, m) * scale * load_n(weight + i, m), m);
  }
}

template <class T>
void run(const RmsNormParams& p) {
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t grain = 1 + 16384 / (p.width + 1);
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
