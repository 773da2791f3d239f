#include "cpu/activation.h"

#include "cpu/parallel.h"
#include "cpu/silu.h"

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
void run(const SiluAndMulParams& p) {
  const int64_t grain = 1 + kGrainElements / (p.width + 1);
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* gate = static_cast<const T*>(p.x.data) + t * p.x.stride;
      const T* up = gate + p.width;
      T* out = static_cast<T*>(p.out.data) + t * p.out.stride;
      int64_t i = 0;
      for (; i + Vec::W <= p.width; i += Vec::W) store(out + i, silu(load(gate + i)) * load(up + i));
      if (const int n = int(p.width - i)) store_n(out + i, silu(load_n(gate + i, n)) * load_n(up + i, n), n);
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
