// A piece of block_attention: one split of the positions for the rows of one task, and its loops over tiles of keys and
// blocks of rows. A thread goes through the tiles of a piece's keys, then through those of its values, then through the
// next piece, and asks for each tile while it is at the one before: arithmetic and reads go on side by side.
//
// Of 16 keys of 64 dimensions a Zen 4 with AVX-512 BF16 has, in cycles: 128 to transpose, 32 a row for scores, 14 a row
// for exponentials, 32 a block of rows to interleave values and 32 a row to weigh them. And 4 KB to read: 540 to 1,000
// cycles at the rate that one core's prefetches reach, 810 as a half of what two cores read together. So the 3 rows of
// SmolLM2's query (390) wait for memory, and the 24 of eight queries (2,190, of which 1,540 are multiply-adds) do not.
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
  int lo[kRows], hi[kRows], begin, end;
  const T *keys[kSplit], *values[kSplit];  // of an fp8 cache narrow ones, up to `narrow`, until they are widened
  int narrow;

  explicit Piece(const AttentionParams& p) : task{Request(p, 0), 0, 0, 0} {}

  // Of keys or values, the tile at `from`, as far as there is any of it.
  Rows tile_of(const T* const* rows, int from, int D) const {
    const int first = from > begin ? from : begin, last = from + kTile < end ? from + kTile : end;
    if (first >= last) return {};
    return {reinterpret_cast<const void* const*>(rows + first), last - first, D * int(first < narrow ? 1 : sizeof(T))};
  }
};

// Scores of the tile's keys for all rows that see any, into w.s. `next` is asked for meanwhile.
template <class E, class T>
void score_tile(const AttentionParams& p, const Piece<T>& piece, int tile, const Rows& next, const Scratch& w) {
  const int D = int(p.head_dim), count = piece.task.count, begin = piece.begin, end = piece.end;
  const int64_t stride = padded(D);
  const int from = begin > tile ? (begin - tile) & -W : 0;
  const int to = end < tile + kTile ? (end - tile + W - 1) & -W : kTile;
  const int before = count <= 4 ? 1 : 0;  // halves to ask for before scores: few rows take as long to load keys for
  const Rows early = next.part(0, before, 2), rest = next.part(before, 2, 2);
  for (int j = from; j < to; j += W)
    load_keys<E>(piece.keys + tile + j, early.part(j - from, j - from + W, to - from), D, w.keys + j);
  row_blocks(count, [&](int r, int n) {
    bool seen = false;
    for (int i = r; i < r + n; ++i) seen |= piece.lo[i] < tile + kTile && piece.hi[i] > tile;
    if (!seen) return;
    const Rows ahead = rest.part(r, r + n, count);
    const E* q = reinterpret_cast<const E*>(w.q + r * stride);
    const float *k = w.keys + from, *scale = w.key_scale + tile + from;
    float* s = w.s + r * kSplit + tile + from;
    const int vectors = (to - from) / W, length = D / kAtOnce<E>;
    with_rows(n, [&](auto R) { scores<R>(q, stride, k, vectors, length, scale, p.softcap, ahead, s); });
  });
}

// Of a pair of keys that a row sees one of, the other's value counts as zero, whatever it is.
template <class E, class T>
void weigh_half(int key, const E* weights, const T* const* values, int D, const Scratch& w, float* acc) {
  const T* pair[2] = {static_cast<const T*>(w.zeros), static_cast<const T*>(w.zeros)};
  pair[key % 2] = values[key];
  weigh<1>(weights + key / 2, pair, Rows{}, D, padded(D), 0, 1, acc);
}

// Adds the weighed values of the tile that each row sees. Weights: (rows, kSplit) numbers. `next`: as above.
template <class E, class T>
void weigh_tile(const Piece<T>& piece, int tile, const E* weights, const Rows& next, int D, const Scratch& w,
                float* acc) {
  constexpr int kOnce = kAtOnce<E>, kRow = kSplit / kOnce;
  const int64_t stride = padded(D);
  const int count = piece.task.count;
  const Rows none;
  const T* const* values = piece.values;
  row_blocks(count, [&](int r, int n) {
    const Rows ahead = next.part(r, r + n, count);
    // In elements: what a row sees whole, and what all of them see whole.
    const int first = tile / kOnce, last = (tile + kTile) / kOnce;
    int all_lo = first, all_hi = last, lo[kBlockRows], hi[kBlockRows], row_lo[kBlockRows], row_hi[kBlockRows];
    for (int i = 0; i < n; ++i) {
      lo[i] = piece.lo[r + i] > tile ? piece.lo[r + i] : tile;
      hi[i] = piece.hi[r + i] < tile + kTile ? piece.hi[r + i] : tile + kTile;
      row_lo[i] = (lo[i] + kOnce - 1) / kOnce;
      row_hi[i] = hi[i] / kOnce;
      all_lo = row_lo[i] > all_lo ? row_lo[i] : all_lo;
      all_hi = row_hi[i] < all_hi ? row_hi[i] : all_hi;
    }
    // Keys that only some of the rows see come before and after those that all see; each row keeps its order.
    if (all_hi <= all_lo) all_lo = all_hi = last;
    for (int i = 0; i < n; ++i) {
      if (lo[i] % kOnce && lo[i] < hi[i]) weigh_half(lo[i], weights + i * kRow, values, D, w, acc + i * stride);
      weigh<1>(weights + i * kRow, values, none, D, stride, row_lo[i], row_hi[i] < all_lo ? row_hi[i] : all_lo,
               acc + i * stride);
    }
    with_rows(n, [&](auto R) { weigh<R>(weights, values, ahead, D, stride, all_lo, all_hi, acc); });
    for (int i = 0; i < n; ++i) {
      weigh<1>(weights + i * kRow, values, none, D, stride, all_hi > row_lo[i] ? all_hi : row_lo[i], row_hi[i],
               acc + i * stride);
      if (hi[i] % kOnce && lo[i] < hi[i]) weigh_half(hi[i] - 1, weights + i * kRow, values, D, w, acc + i * stride);
    }
    weights += n * kRow, acc += n * stride;
  });
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
