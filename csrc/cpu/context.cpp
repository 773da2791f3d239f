#include "cpu/context.h"

#include <type_traits>

#include "cpu/parallel.h"

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
void write_v(const T* v, T* out, int64_t dim, float scale) {
  if (scale == 1.0f) {
    std::memcpy(out, v, sizeof(T) * dim);
    return;
  }
  const Vec factor = set1(scale);
  for (int64_t i = 0; i < dim; i += Vec::W) store_n(out + i, load_n(v + i, int(dim - i)) * factor, int(dim - i));
}

// To a cache of C: of T, or fp8, which takes the rows that one of T would.
template <class C, class T>
void write_row(const WriteContextKvParams& p, const T* k, int64_t layer, int64_t slot, const float* cos_sin) {
  const T* v = k + p.num_kv_heads * p.head_dim;
  const T* weight = p.k_weights ? static_cast<const T*>(p.k_weights) + layer * p.head_dim : nullptr;
  C* k_out = k_at<C>(p.cache, p.k_caches[layer], slot);
  C* v_out = v_at<C>(p.cache, p.v_caches[layer], slot);
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    const T *k_head = k + h * p.head_dim, *v_head = v + h * p.head_dim;
    C *k_to = k_out + h * p.cache.k_head, *v_to = v_out + h * p.cache.v_head;
    if constexpr (std::is_same_v<C, T>) {
      norm_rope_head(k_head, weight, k_to, p.head_dim, p.eps, p.table, cos_sin);
      write_v(v_head, v_to, p.head_dim, p.v_scale);
    } else {
      T row[kMaxHeadDim];
      norm_rope_head(k_head, weight, row, p.head_dim, p.eps, p.table, cos_sin);
      quantise_row(row, k_to, p.head_dim, scale_of({p.k_scales[layer], p.k_scale_head}, h));
      write_v(v_head, row, p.head_dim, p.v_scale);
      quantise_row(row, v_to, p.head_dim, scale_of({p.v_scales[layer], p.v_scale_head}, h));
    }
  }
}

template <class C, class T>
void run(const WriteContextKvParams& p) {
  const int64_t layer_width = 2 * p.num_kv_heads * p.head_dim;
  const int64_t block = p.commit_lens && p.requests ? p.tokens / p.requests : 1;
  // Work items are (token, layer), layers inside, so that few tokens of a deep drafter still use all threads.
  parallel_for(p.tokens * p.layers, 1 + 8192 / (layer_width + 1), [&](int64_t begin, int64_t end) {
    float buffer[kMaxHeadDim];
    const float* cos_sin = nullptr;
    int64_t have = -1;  // the token that cos_sin is of
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / p.layers, layer = item % p.layers;
      if (p.commit_lens && t % block >= p.commit_lens[t / block]) continue;
      const int64_t slot = p.slots[layer * p.slots_layer_stride + t];
      if (!slot_exists(p.cache, slot)) continue;
      if (have != t) cos_sin = table_row<T>(p.table, p.positions[t], buffer);
      have = t;
      if (!cos_sin) continue;
      write_row<C>(p, static_cast<const T*>(p.kv.data) + t * p.kv.stride + layer * layer_width, layer, slot, cos_sin);
    }
  });
}

}  // namespace

void write_context_kv(const WriteContextKvParams& p) {
  switch (p.dtype) {
    case Dtype::f32: return p.cache.is_fp8 ? run<fp8, float>(p) : run<float, float>(p);
    case Dtype::bf16: return p.cache.is_fp8 ? run<fp8, bf16>(p) : run<bf16, bf16>(p);
    case Dtype::f16: return p.cache.is_fp8 ? run<fp8, f16>(p) : run<f16, f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
