// One head's RMSNorm and rotary embedding, and the cache it may be stored to: shared by qk_norm_rope and
// write_context_kv, so that a context key has the bits of the same key in a block.
#pragma once

#include "cpu/fp8.h"

namespace dflash {

constexpr int64_t kMaxHeadDim = 1024;  // MAX_HEAD_DIM in dflash_kernels/limits.py

}  // namespace dflash

namespace dflash::DFLASH_ISA {
namespace {

// The table's row for a position as float32, in the table itself or in `buffer` (rotary_dim floats); nullptr where the
// table has no such row.
template <class T>
inline const float* table_row(const RotaryTable& table, int64_t position, float* buffer) {
  if (!table.cos_sin) return buffer;
  if (position < 0 || position >= table.max_pos) return nullptr;
  const int64_t at = position * table.rotary_dim;
  if (table.is_float) return static_cast<const float*>(table.cos_sin) + at;
  const T* row = static_cast<const T*>(table.cos_sin) + at;
  for (int64_t i = 0; i < table.rotary_dim; i += Vec::W)
    store_n(buffer + i, load_n(row + i, int(table.rotary_dim - i)), int(table.rotary_dim - i));
  return buffer;
}

// h (dim floats) = norm of x, or x itself without a weight.
template <class T>
inline void norm_head(const T* x, const T* weight, float* h, int64_t dim, float eps, bool round_each) {
  Vec squares = set1(0.0f);
  for (int64_t i = 0; i < dim; i += Vec::W) {
    const Vec v = load_n(x + i, int(dim - i));
    store_n(h + i, v, int(dim - i));
    squares = fma(v, v, squares);
  }
  if (!weight) return;
  const Vec scale = set1(1.0f / std::sqrt(reduce_add(squares) / float(dim) + eps));
  for (int64_t i = 0; i < dim; i += Vec::W) {
    const int n = int(dim - i);
    const Vec v = load_n(h + i, n) * scale * load_n(weight + i, n);
    store_n(h + i, round_each ? rounded<T>(v) : v, n);
  }
}

// Products and sums stay separate operations: without a norm, the bits are those of the plain expression.
inline void rotate_head(float* h, const float* cos, int64_t rotary_dim, bool interleaved) {
  const int64_t half = rotary_dim / 2;
  const float* sin = cos + half;
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = h[2 * i], b = h[2 * i + 1];
      h[2 * i] = a * cos[i] - b * sin[i];
      h[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; i += Vec::W) {
    const int n = int(half - i);
    const Vec a = load_n(h + i, n), b = load_n(h + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(h + i, a * c - b * s, n);
    store_n(h + half + i, b * c + a * s, n);
  }
}

// out may be x. `row` is what table_row returned for this token, not nullptr.
template <class T>
inline void norm_rope_head(const T* x, const T* weight, T* out, int64_t dim, float eps, const RotaryTable& table,
                           const float* row) {
  float h[kMaxHeadDim];
  norm_head(x, weight, h, dim, eps, table.round_each);
  if (table.cos_sin) rotate_head(h, row, table.rotary_dim, table.interleaved);
  for (int64_t i = 0; i < dim; i += Vec::W) store_n(out + i, load_n(h + i, int(dim - i)), int(dim - i));
}

inline bool slot_exists(const CacheView& cache, int64_t slot) {
  return slot >= 0 && slot < cache.num_pages * cache.page_size;
}

template <class T>
inline T* k_at(const CacheView& c, void* base, int64_t slot) {
  return static_cast<T*>(base) + slot / c.page_size * c.k_page + slot % c.page_size * c.k_row;
}

template <class T>
inline T* v_at(const CacheView& c, void* base, int64_t slot) {
  return static_cast<T*>(base) + slot / c.page_size * c.v_page + slot % c.page_size * c.v_row;
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
