#include "cpu/rope.h"

#include "cpu/parallel.h"

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
void store_head(const T* from, T* to, int64_t dim, const float*) {
  std::memcpy(to, from, sizeof(T) * dim);
}
template <class T>
void store_head(const T* from, fp8* to, int64_t dim, const float* scale) {
  quantise_row(from, to, dim, scale);
}

// Stores the finished K heads and the V heads that follow them at the token's slot of a cache of C.
template <class C, class T>
void store_row(const QkNormRopeParams& p, const T* k, int64_t slot) {
  if (!slot_exists(p.cache, slot)) return;
  const T* v = k + p.num_kv_heads * p.head_dim;
  C* k_out = k_at<C>(p.cache, p.k_cache, slot);
  C* v_out = v_at<C>(p.cache, p.v_cache, slot);
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    store_head(k + h * p.head_dim, k_out + h * p.cache.k_head, p.head_dim, scale_of(p.k_scale, h));
    store_head(v + h * p.head_dim, v_out + h * p.cache.v_head, p.head_dim, scale_of(p.v_scale, h));
  }
}

template <class T>
void run(const QkNormRopeParams& p) {
  const int64_t heads = p.num_heads + p.num_kv_heads, dim = p.head_dim;
  const int64_t grain = 1 + kGrainElements / (heads * dim + 1);
  parallel_for(p.tokens, grain, [&](int64_t begin, int64_t end) {
    float buffer[kMaxHeadDim];
    for (int64_t t = begin; t < end; ++t) {
      T* row = static_cast<T*>(p.qkv.data) + t * p.qkv.stride;
      const float* cos_sin = table_row<T>(p.table, p.positions[t], buffer);
      if (!cos_sin) {
        const T nan = from_float<T>(NAN);
        for (int64_t i = 0; i < heads * dim; ++i) row[i] = nan;
        continue;
      }
      for (int64_t h = 0; h < heads; ++h) {
        const void* weight = h < p.num_heads ? p.q_weight : p.k_weight;
        T* x = row + h * dim;
        norm_rope_head(x, static_cast<const T*>(weight), x, dim, p.eps, p.table, cos_sin);
      }
      if (!p.k_cache) continue;
      if (p.cache.is_fp8) store_row<fp8>(p, row + p.num_heads * dim, p.slots[t]);
      else store_row<T>(p, row + p.num_heads * dim, p.slots[t]);
    }
  });
}

}  // namespace

void qk_norm_rope(const QkNormRopeParams& p) {
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
