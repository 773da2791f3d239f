// A piece of block_attention: one split of the positions for the rows of one task, and its loops over tiles of keys and
// blocks of four rows.
//
// Of 16 keys of 64 dimensions a Zen 4 with AVX-512 BF16 has, in cycles: 128 to transpose, 32 a row for scores, 14 a row
// for exponentials, 32 a block of rows to interleave values and 32 a row to weigh them. And 4 KB to read: 540 to 1,000
// cycles at the rate that one core's prefetches reach, 810 as a half of what two cores read together. So the 3 rows of
// SmolLM2's query (390) wait for memory, and the 24 of eight queries (2,190, of which 1,540 are multiply-adds) do not.
// Measured, two cores, 1,024 tokens in pages of 16: 35 us, 60 % of the read bandwidth, and 92 us, 44 % of the highest
// rate of multiply-adds; from a warm cache 61 %.
#pragma once

#include "cpu/attention_work.h"

namespace dflash::DFLASH_ISA {
namespace {

// Row r sees keys [lo[r], hi[r]) of the split, and [begin, end) is what the rows see together.
template <class T>
struct Piece {
  Task task;
  int64_t index, number;  // of the task, of the split
  bool first, last;       // of what this thread does of the task; when tasks are cut by split, either
  bool asked;             // its keys are on their way
  int lo[kRows], hi[kRows], begin, end;
  const T *keys[kSplit], *values[kSplit];  // of an fp8 cache narrow ones, up to `narrow`, until they are widened
  int narrow;

  explicit Piece(const AttentionParams& p) : task{Request(p, 0), 0, 0, 0} {}

  // Asks for rows [from, to) of keys or values, as far as there are any.
  __attribute__((always_inline)) void ask(const T* const* rows, int from, int to, int D) const {
    for (int j = from > begin ? from : begin; j < to && j < end; ++j)
      if (j < narrow) prefetch_row(reinterpret_cast<const fp8*>(rows[j]), D);
      else prefetch_row(rows[j], D);
  }
};

// Scores of the tile's keys for all rows that see any, into w.s.
template <class E, class T>
void score_tile(const AttentionParams& p, const Piece<T>& piece, int tile, const Scratch& w) {
  const int D = int(p.head_dim), count = piece.task.count, begin = piece.begin, end = piece.end;
  const int64_t stride = padded(D);
  const int from = begin > tile ? (begin - tile) & -W : 0;
  const int to = end < tile + kTile ? (end - tile + W - 1) & -W : kTile;
  // The values are weighed after all of the split's scores: time enough for them to come. They are asked for in small
  // shares, where most of the time is spent.
  const bool few = count <= 4;
  for (int j = from; j < to; j += W) {
    if (!piece.asked) piece.ask(piece.keys, tile + j + kTile, tile + j + kTile + W, D);
    load_keys<E>(piece.keys + tile + j, few ? piece.values + tile + j : nullptr, D, w.keys + j);
  }
  for (int r = 0; r < count; r += 4) {
    const int n = count - r < 4 ? count - r : 4;
    if (!few) piece.ask(piece.values, tile + kTile * r / count, tile + kTile * (r + n) / count, D);
    bool seen = false;
    for (int i = r; i < r + n; ++i) seen |= piece.lo[i] < tile + kTile && piece.hi[i] > tile;
    if (!seen) continue;
    const E* q = reinterpret_cast<const E*>(w.q + r * stride);
    const float *k = w.keys + from, *scale = w.key_scale + tile + from;
    float* s = w.s + r * kSplit + tile + from;
    const int vectors = (to - from) / W, length = D / kAtOnce<E>;
    switch (n) {
      case 4: scores<4>(q, stride, k, vectors, length, scale, p.softcap, s); break;
      case 3: scores<3>(q, stride, k, vectors, length, scale, p.softcap, s); break;
      case 2: scores<2>(q, stride, k, vectors, length, scale, p.softcap, s); break;
      default: scores<1>(q, stride, k, vectors, length, scale, p.softcap, s);
    }
  }
}

// Of a pair of keys that a row sees one of, the other's value counts as zero, whatever it is.
template <class E, class T>
void weigh_half(int key, const E* weights, const T* const* values, int D, const Scratch& w, float* acc) {
  const T* pair[2] = {static_cast<const T*>(w.zeros), static_cast<const T*>(w.zeros)};
  pair[key % 2] = values[key];
  weigh<1>(weights + key / 2, pair, static_cast<const T* const*>(nullptr), D, padded(D), 0, 1, acc);
}

// The weighed sum of the values that each row sees. Weights: (rows, kSplit) numbers. The keys of `next`,
// or null, are asked for.
template <class E, class T>
void weigh_rows(const Piece<T>& piece, const E* weights, const Piece<T>* next, int D, const Scratch& w, float* acc) {
  constexpr int kOnce = kAtOnce<E>, kRow = kSplit / kOnce;
  const int64_t stride = padded(D);
  const int count = piece.task.count;
  const bool few = count <= 4;
  const T *const *values = piece.values, *const *none = nullptr, *const *ahead = few && next ? next->keys : nullptr;
  for (int64_t i = 0; i < count * stride; ++i) acc[i] = 0.0f;
  for (int r = 0; r < count; r += 4, weights += 4 * kRow, acc += 4 * stride) {
    const int n = count - r < 4 ? count - r : 4, *lo = piece.lo + r, *hi = piece.hi + r;
    if (next && !few) next->ask(next->keys, kSplit * r / count, kSplit * (r + n) / count, D);
    // In elements: what a row sees whole, and what all of them see whole.
    int all_lo = 0, all_hi = kRow, row_lo[4], row_hi[4];
    for (int i = 0; i < n; ++i) {
      row_lo[i] = (lo[i] + kOnce - 1) / kOnce;
      row_hi[i] = hi[i] / kOnce;
      all_lo = row_lo[i] > all_lo ? row_lo[i] : all_lo;
      all_hi = row_hi[i] < all_hi ? row_hi[i] : all_hi;
    }
    // Keys that only some of the rows see come before and after those that all see; each row keeps its order.
    if (all_hi <= all_lo) all_lo = all_hi = kRow;
    for (int i = 0; i < n; ++i) {
      if (lo[i] % kOnce && lo[i] < hi[i]) weigh_half(lo[i], weights + i * kRow, values, D, w, acc + i * stride);
      weigh<1>(weights + i * kRow, values, none, D, stride, row_lo[i], row_hi[i] < all_lo ? row_hi[i] : all_lo,
               acc + i * stride);
    }
    switch (n) {
      case 4: weigh<4>(weights, values, ahead, D, stride, all_lo, all_hi, acc); break;
      case 3: weigh<3>(weights, values, ahead, D, stride, all_lo, all_hi, acc); break;
      case 2: weigh<2>(weights, values, ahead, D, stride, all_lo, all_hi, acc); break;
      default: weigh<1>(weights, values, ahead, D, stride, all_lo, all_hi, acc);
    }
    for (int i = 0; i < n; ++i) {
      weigh<1>(weights + i * kRow, values, none, D, stride, all_hi > row_lo[i] ? all_hi : row_lo[i], row_hi[i],
               acc + i * stride);
      if (hi[i] % kOnce && lo[i] < hi[i]) weigh_half(hi[i] - 1, weights + i * kRow, values, D, w, acc + i * stride);
    }
  }
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
