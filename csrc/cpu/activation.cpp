#include "cpu/activation.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
void run(const SiluAndMulParams& p) {
  const int64_t grain = 1 + kGrainElements / (p.width + 1);
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
    const Vec zero = set1(0.0f), one = set1(1.0f);
    for (int64_t t = begin; t < end; ++t) {
      const T* gate = static_cast<const T*>(p.x.data) + t * p.x.stride;
      const T* up = gate + p.width;
      T* out = static_cast<T*>(p.out.data) + t * p.out.stride;
      for (int64_t i = 0; i < p.width; i += Vec::W) {
        const int n = int(p.width - i);
        const Vec g = load_n(gate + i, n);
        store_n(out + i, g / (one + vexp(zero - g)) * load_n(up + i, n), n);
      }
    }
  });
}

}  // namespace

void silu_and_mul(const SiluAndMulParams& p) {
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
