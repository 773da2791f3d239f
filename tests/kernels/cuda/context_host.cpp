// The steps of the CUDA C++ kernel of write_context_kv, run by the host: a loop over lanes where the GPU has a warp.
#include "cuda/context.cuh"

namespace {

using namespace dflash;
using namespace dflash::cuda;

template <class L>
struct LoopGroup {
  L lane[32];
  int lanes;

  template <class F>
  void each(F f) {
    for (int i = 0; i < lanes; ++i) f(lane[i], i);
  }
  template <class F>
  void add(F of) {
    for (int step = 1; step < lanes; step *= 2) {
      float sum[32];
      for (int i = 0; i < lanes; ++i) sum[i] = of(lane[i]) + of(lane[i ^ step]);
      for (int i = 0; i < lanes; ++i) of(lane[i]) = sum[i];
    }
  }
};

template <class T, class C, int N, bool kTail>
void run(const WriteContextKvParams& p, const ContextShape& shape) {
  for (int64_t layer = 0; layer < p.layers; ++layer)
    for (int64_t item = 0; item < p.tokens * p.num_kv_heads; ++item) {
      Head<T, C> head;
      if (!find_head(p, shape.block, item / p.num_kv_heads, layer, item % p.num_kv_heads, head)) continue;
      LoopGroup<Lane<T, C, N, kTail>> group;
      group.lanes = shape.lanes;
      write_head<Lane<T, C, N, kTail>, N>(p, head, shape, group);
    }
}

template <class T, class C>
void run(const WriteContextKvParams& p) {
  const ContextShape shape = context_shape(p);
  constexpr int kWord = 16 / sizeof(T);
  if (!shape.words) return run<T, C, 1, true>(p, shape);
  shape.tail ? run<T, C, kWord, true>(p, shape) : run<T, C, kWord, false>(p, shape);
}

template <class T>
void run(const WriteContextKvParams& p) {
  p.cache.is_fp8 ? run<T, uint8_t>(p) : run<T, T>(p);
}

}  // namespace

extern "C" {

size_t params_size() { return sizeof(WriteContextKvParams); }

void context_shape_of(const WriteContextKvParams* p, int out[3]) {
  const ContextShape shape = context_shape(*p);
  out[0] = shape.lanes, out[1] = shape.rounds, out[2] = shape.words;
}

void write_context_kv(const WriteContextKvParams* p) {
  switch (p->dtype) {
    case Dtype::f32: return run<float>(*p);
    case Dtype::bf16: return run<__nv_bfloat16>(*p);
    case Dtype::f16: return run<__half>(*p);
  }
}

}
