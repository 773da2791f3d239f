// How rows of x and blocks of the weight are cut into what registers hold, where there are no tiles.
//
// Few rows wait for memory. With more of them arithmetic takes as long or longer, and memory must not wait for it. A
// group has up to 12 rows by two blocks with 512 bits, half of that with 256, and its loop asks for a line whenever it
// has used one. More rows make several groups. They take turns over a chunk of K that stays in the
// first-level cache, their sums wait in memory meanwhile, and each asks for its part of the next chunk: requests are
// spread over all of the arithmetic.
//
// A sum waits four cycles for the multiply-add before it, and a core begins two a cycle: fewer than 8 sums leave it
// idle, and 12 keep it from waiting. 7 or 8 rows would be two groups of at most 8 sums with 256 bits, so they are pairs
// by three neighbouring blocks.
#pragma once

#include "cpu/gemm_micro.h"
#include "cpu/memory.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kAccumulators = Vec::W == 16 ? 24 : DFLASH_VEC ? 12 : 8;  // of 32 registers, 16 or 16 halves
constexpr int kGroupRows = Vec::W == 16 ? 12 : kAccumulators / kBlockVectors;
constexpr int rows_beside(int blocks) {  // that a group can have
  const int rows = kAccumulators / (blocks * kBlockVectors);
  return rows < kGroupRows ? rows : kGroupRows;
}
constexpr int64_t kChunk = 256;  // two blocks of bf16 and what is asked for meanwhile: 32 KB

constexpr int64_t kAheadLines = 128;  // that a thread asks for ahead of its loads with one group

// Whether so many rows meet one block after the other, in one sequential stream. Of pairs of bf16 a line takes from 5
// rows on as long as reading it, and the stream that the hardware's prefetchers follow best is the faster; below and
// above, two blocks that share what is loaded of x are.
template <class X, class Weight>
inline bool in_one_stream(int64_t rows) {
  const int64_t groups = ceil_div(rows, kGroupRows);
  return ceil_div(rows, groups) > rows_beside(2) ||
         (DFLASH_BF16_DOT && std::is_same_v<X, bf16> && std::is_same_v<Weight, bf16> && rows > 4 && rows <= 8);
}

// Neighbouring blocks that pairs of rows meet at once.
constexpr int kPairBlocks = 3;
inline bool in_pairs(int64_t rows) { return DFLASH_VEC == 256 && (rows == 7 || rows == 8); }

// `rows` <= MAX rows in one register group.
template <class Op, class Weight, int S, int MAX>
inline void one_group(const typename Op::X* x, int64_t ld, int rows, const Weight* const* w, int64_t K, Ahead ahead,
                      Place sums) {
  if (rows == MAX) return Op::template group<MAX, S>(x, ld, w, K, ahead, sums);
  if constexpr (MAX > 1) one_group<Op, Weight, S, MAX - 1>(x, ld, rows, w, K, ahead, sums);
}

// Sums of all rows of a panel against S blocks, c[r * ldc + s * 16 + j], in groups of about equal size.
template <class Op, class Weight, int S>
inline void row_groups(const typename Op::X* x, int64_t ld, int rows, int groups, const Weight* const* w, int64_t depth,
                       float* c, int64_t ldc) {
  const int64_t pieces = groups > 1 ? ceil_div(depth, kChunk) : 1, chunk = ceil_div(depth, 32 * pieces) * 32;
  for (int64_t k = 0, n; k < depth; k += n) {
    n = depth - k < chunk ? depth - k : chunk;
    for (int g = 0, r = 0, m; g < groups; ++g, r += m) {
      m = int(ceil_div(rows - r, groups - g));
      const Weight* at[S];
      for (int s = 0; s < S; ++s) at[s] = w[s] + k * kBlock;
      Ahead ahead{kAheadLines * kLine / S, kLine};
      if (groups > 1) {
        const int64_t bytes = n * kBlock * sizeof(Weight), others = (S - 1) * depth * kBlock * sizeof(Weight);
        ahead = {bytes + bytes * g / groups, ceil_div(kLine, groups)};
        if (S == kPairBlocks && k + n == depth) ahead.at += others;  // the neighbours are being read already
      }
      one_group<Op, Weight, S, rows_beside(S)>(x + r * ld + k, ld, m, at, n, ahead,
                                                {c + r * ldc, ldc, k == 0});
    }
  }
}

// Up to a panel of rows against S blocks, as many of these at once as the largest group of rows leaves registers for.
template <class Op, class Weight, int S>
inline void rows_by_blocks(const typename Op::X* x, int64_t ld, int rows, const Weight* const* w, int64_t depth,
                           float* c, int64_t ldc) {
  const int groups = int(ceil_div(rows, S == kPairBlocks ? 2 : kGroupRows));
  if constexpr (S > 1 && S != kPairBlocks)
    if (ceil_div(rows, groups) > rows_beside(S)) {
      rows_by_blocks<Op, Weight, S / 2>(x, ld, rows, w, depth, c, ldc);
      return rows_by_blocks<Op, Weight, S / 2>(x, ld, rows, w + S / 2, depth, c + S / 2 * kBlock, ldc);
    }
  row_groups<Op, Weight, S>(x, ld, rows, groups, w, depth, c, ldc);
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
