#include "cpu/linear.h"

#include "cpu/gemm.h"

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
void run(const LinearParams& p) {
  const GemmParams& g = p.gemm;
  auto epilogue = [&](const float* c, int64_t ldc, int64_t r0, int rows, int64_t n0) {
    const T* bias = static_cast<const T*>(g.bias);
    for (int r = 0; r < rows; ++r) {
      T* out = static_cast<T*>(p.out.data) + (r0 + r) * p.out.stride + n0;
      for (int v = 0; v < kBlock && n0 + v < g.N; v += Vec::W) {
        const int m = int(g.N - n0 - v);
        Vec y = load(c + r * ldc + v);
        if (g.scales) y = y * load_n(g.scales + n0 + v, m);
        if (bias) y = y + load_n(bias + n0 + v, m);
        store_n(out + v, y, m);
      }
    }
  };
  parallel_for(gemm_block_count(g), gemm_grain(g),
               [&](int64_t begin, int64_t end) { gemm_blocks<T>(g, begin, end, epilogue); });
}

}  // namespace

void linear(const LinearParams& p) {
  switch (p.gemm.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
