// One matrix product of a 16 x 8 x 16 tile written with CuTe: shows that its headers compile for every architecture.
#include <cute/tensor.hpp>

extern "C" __global__ void __launch_bounds__(32)
    cute_probe(const cute::bfloat16_t* a, const cute::bfloat16_t* b, float* c) {
  using namespace cute;
  const auto mma = make_tiled_mma(SM80_16x8x16_F32BF16BF16F32_TN{});
  const auto thread = mma.get_slice(threadIdx.x);
  const Tensor rows = make_tensor(make_gmem_ptr(a), Shape<_16, _16>{}, LayoutRight{});
  const Tensor columns = make_tensor(make_gmem_ptr(b), Shape<_8, _16>{}, LayoutRight{});
  Tensor out = make_tensor(make_gmem_ptr(c), Shape<_16, _8>{}, LayoutRight{});
  const auto rows_here = thread.partition_A(rows);
  const auto columns_here = thread.partition_B(columns);
  auto out_here = thread.partition_C(out);
  auto x = thread.make_fragment_A(rows_here);
  auto y = thread.make_fragment_B(columns_here);
  auto sum = thread.make_fragment_C(out_here);
  copy(rows_here, x);
  copy(columns_here, y);
  clear(sum);
  gemm(mma, x, y, sum);
  copy(sum, out_here);
}
