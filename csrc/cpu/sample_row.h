// One row of logits, read chunk by chunk: an engine's adjustments are applied on the way.
#pragma once

#include "cpu/argmax.h"
#include "cpu/memory.h"
#include "cpu/sample.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kChunk = kSampleChunk;

struct Row {
  const void* x;
  Dtype dtype;
  int64_t size;
  const uint32_t* seen;  // null: no penalty
  float penalty;
  const float* bias;        // null: none
  const uint32_t* bitmask;  // null: none

  int64_t chunks() const { return ceil_div(size, kChunk); }
  bool adjusted() const { return seen || bias || bitmask; }
};

inline uint32_t bit(const uint32_t* words, int64_t i) { return (words[i / 32] >> (i % 32)) & 1; }

template <class T>
void adjust(const Row& row, const T* x, int64_t first, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = to_float(x[i]);
  if (row.seen)
    for (int i = 0; i < n; ++i) {
      const float shrunk = out[i] / row.penalty, grown = out[i] * row.penalty;
      out[i] = bit(row.seen, first + i) ? (out[i] > 0.0f ? shrunk : grown) : out[i];
    }
  if (row.bias)
    for (int i = 0; i < n; ++i) out[i] += row.bias[first + i];
  if (row.bitmask)
    for (int i = 0; i < n; ++i) out[i] = bit(row.bitmask, first + i) ? out[i] : -INFINITY;
}

// Calls f(values, n, first) for chunk c of the row, which starts at token `first`: n is a whole number of vectors. The
// values are the row's own memory where that will do, else a copy in float32 that ends in -inf.
template <class T, class F>
void with_chunk_of(const Row& row, int64_t c, const F& f) {
  const int64_t first = c * kChunk;
  const T* x = static_cast<const T*>(row.x) + first;
  const int n = int(row.size - first < kChunk ? row.size - first : kChunk);
  if (!row.adjusted() && n % Vec::W == 0) return f(x, n, first);
  alignas(64) float copy[kChunk];
  adjust(row, x, first, n, copy);
  const int padded = (n + Vec::W - 1) / Vec::W * Vec::W;
  for (int i = n; i < padded; ++i) copy[i] = -INFINITY;
  f(static_cast<const float*>(copy), padded, first);
}

template <class F>
void with_chunk(const Row& row, int64_t c, const F& f) {
  switch (row.dtype) {
    case Dtype::f32: return with_chunk_of<float>(row, c, f);
    case Dtype::bf16: return with_chunk_of<bf16>(row, c, f);
    case Dtype::f16: return with_chunk_of<f16>(row, c, f);
  }
}

// Asks for chunk c, which is to be read soon: a row is one stream, and the machine's own prefetcher stops at every
// page.
inline void prefetch_chunk(const Row& row, int64_t c) {
#if DFLASH_VEC
  if (c >= row.chunks()) return;
  const int64_t size = row.dtype == Dtype::f32 ? 4 : 2, end = row.size * size;
  const char* memory = static_cast<const char*>(row.x);
  for (int64_t at = c * kChunk * size; at < (c + 1) * kChunk * size && at < end; at += 64)
    _mm_prefetch(memory + at, _MM_HINT_T0);
#else
  (void)row, (void)c;
#endif
}

inline float value_at(const Row& row, int64_t i) {
  float x = 0.0f;
  switch (row.dtype) {
    case Dtype::f32: adjust(row, static_cast<const float*>(row.x) + i, i, 1, &x); break;
    case Dtype::bf16: adjust(row, static_cast<const bf16*>(row.x) + i, i, 1, &x); break;
    case Dtype::f16: adjust(row, static_cast<const f16*>(row.x) + i, i, 1, &x); break;
  }
  return x;
}

// By torch.argmax's rules. A chunk's padding never wins, as the chunk's own first value comes before it.
inline int64_t argmax_of(const Row& row) {
  Best best{-INFINITY, INT64_MAX};
  for (int64_t c = 0; c < row.chunks(); ++c)
    with_chunk(row, c, [&](const auto* x, int n, int64_t first) {
      const int64_t i = argmax(x, n);
      if (const Best found{to_float(x[i]), first + i}; wins(found, best)) best = found;
    });
  return best.index;
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
