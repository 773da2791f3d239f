#include "cuda/context.cuh"
#include "cuda/context.h"

namespace dflash::cuda {
namespace {

constexpr int kThreads = 128;

template <class L>
struct WarpGroup {
  L own;
  int lane, lanes;

  template <class F>
  DFLASH_HD void each(F f) {
    f(own, lane);
  }
  template <class F>
  DFLASH_HD void add(F of) {
#ifdef __CUDA_ARCH__
    const unsigned group = (0xffffffffu >> (32 - lanes)) << (threadIdx.x % 32 / lanes * lanes);
    for (int step = 1; step < lanes; step *= 2) of(own) += __shfl_xor_sync(group, of(own), step);
#endif
  }
};

// The parameters, with every layer's base addresses, travel with the launch: a captured graph has them, and no memory
// of the device is needed for them.
template <class T, class C, int N, bool kTail>
__global__ void __launch_bounds__(kThreads)
    write_context_kv_kernel(const __grid_constant__ WriteContextKvParams p, const ContextShape shape) {
  const int64_t item = int64_t(blockIdx.x) * (kThreads / shape.lanes) + threadIdx.x / shape.lanes;
  const int64_t token = item / p.num_kv_heads;
  if (token >= p.tokens) return;
  Head<T, C> head;
  if (!find_head(p, shape.block, token, blockIdx.y, item % p.num_kv_heads, head)) return;
  WarpGroup<Lane<T, C, N, kTail>> group;
  group.lane = threadIdx.x % shape.lanes;
  group.lanes = shape.lanes;
  write_head<Lane<T, C, N, kTail>, N>(p, head, shape, group);
}

template <class T, class C>
void launch_for(const WriteContextKvParams& p, cudaStream_t stream) {
  const ContextShape shape = context_shape(p);
  const int64_t groups = kThreads / shape.lanes;
  const dim3 grid(unsigned((p.tokens * p.num_kv_heads + groups - 1) / groups), unsigned(p.layers));
  constexpr int kWord = 16 / sizeof(T);
  const auto kernel = !shape.words ? write_context_kv_kernel<T, C, 1, true>
                      : shape.tail ? write_context_kv_kernel<T, C, kWord, true>
                                   : write_context_kv_kernel<T, C, kWord, false>;
  kernel<<<grid, kThreads, 0, stream>>>(p, shape);
}

template <class T>
void launch(const WriteContextKvParams& p, cudaStream_t stream) {
  p.cache.is_fp8 ? launch_for<T, uint8_t>(p, stream) : launch_for<T, T>(p, stream);
}

}  // namespace

const char* write_context_kv(const WriteContextKvParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.tokens * p.layers * p.num_kv_heads * p.head_dim * p.cache.num_pages * p.cache.page_size == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::f32: launch<float>(p, on); break;
    case Dtype::bf16: launch<__nv_bfloat16>(p, on); break;
    case Dtype::f16: launch<__half>(p, on); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dflash::cuda
