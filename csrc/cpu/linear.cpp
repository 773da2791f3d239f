#include "cpu/linear.h"

#include "cpu/gemm.h"

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
void run(const LinearParams& p) {
  const GemmParams& g = p.gemm;
  auto epilogue = [&](const float* c, int64_t ldc, int64_t r0, int rows, int64_t n0) {
    store_sums<T>(g, static_cast<T*>(p.out.data), p.out.stride, c, ldc, r0, rows, n0);
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
