// The weight-streaming product behind `linear` and the heads: out = x W^T for few rows of x.
//
// Floor: the weight's bytes over the read bandwidth. W is packed so that 16 outputs form a block whose bytes lie in
// the order they are used ([N/16][K/2][16][2] for bf16, so that one 64-byte line holds a pair of k for 16 outputs and
// 16 lines are one AMX tile; [N/16][K][16] for f32, f16 and, K filled up to whole tiles, int8). Each thread walks four
// blocks at once, a quarter of its range apart: four long streams use more of the memory than one does.
//
// Every output is one accumulator that runs over k in order, so its bits depend on its row of x and its row of W
// alone: not on how many rows there are, how they are grouped into registers or tiles, or on the number of threads.
//
// An int8 weight is half of bf16's bytes and becomes x's type on its way into registers, exactly; its scales wait for
// the sums. Widening it takes about three cycles of a core for a line of 32, less than reading them does.
#pragma once

#include <type_traits>

#include "cpu/gemm_params.h"
#include "cpu/gemm_rows.h"
#include "cpu/gemm_tiles.h"
#include "cpu/parallel.h"
#include "cpu/quant.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kStreams = 4;   // blocks walked at once
constexpr int kTileRows = 16;

inline int64_t padded_k(int64_t K) { return ceil_div(K, 32) * 32; }

// Packed elements of one block.
template <class T> inline int64_t block_elements(int64_t K) { return kBlock * K; }
template <> inline int64_t block_elements<bf16>(int64_t K) { return kBlock * padded_k(K); }
template <> inline int64_t block_elements<int8_t>(int64_t K) { return kBlock * padded_k(K); }

// Packs rows [n0, n0 + 16) of a row-major weight as pack_weight does.
inline void pack_block(const bf16* w, int64_t stride, int64_t n0, int64_t N, int64_t K, bf16* to) {
  for (int64_t kp = 0; kp < padded_k(K) / 2; ++kp)
    for (int j = 0; j < kBlock; ++j)
      for (int h = 0; h < 2; ++h) {
        const int64_t k = 2 * kp + h, n = n0 + j;
        to[(kp * kBlock + j) * 2 + h] = n < N && k < K ? w[n * stride + k] : bf16{0};
      }
}
template <class T>
inline void pack_block(const T* w, int64_t stride, int64_t n0, int64_t N, int64_t K, T* to) {
  for (int64_t k = 0; k < K; ++k)
    for (int j = 0; j < kBlock; ++j) to[k * kBlock + j] = n0 + j < N ? w[(n0 + j) * stride + k] : T{};
}

// ---- rows of x, as the micro-kernels want them
// -----------------------------------------------------------------------

// Elements between rows: an odd number of cache lines, so that rows at one k are in different sets of the first-level
// cache, whatever K is.
template <class X> inline int64_t row_stride(int64_t K) {
  constexpr int64_t line = kLine / int64_t(sizeof(X));
  return (ceil_div(padded_k(K), line) | 1) * line;
}

// One row of x in the type that the micro-kernels take, zero past K.
template <class T>
inline void prepare_row(const T* x, int64_t K, float* to) {
  for (int64_t k = 0; k < padded_k(K); k += Vec::W) store(to + k, load_n(x + k, int(K > k ? K - k : 0)));
}
#if DFLASH_BF16_DOT
inline void prepare_row(const bf16* x, int64_t K, bf16* to) {
  std::memcpy(to, x, K * sizeof(bf16));
  std::memset(to + K, 0, (padded_k(K) - K) * sizeof(bf16));
}
#endif

// Rows of x for OP.
template <class Op, class T>
inline const typename Op::X* prepare_rows(const T* x, int64_t stride, int64_t rows, int64_t K, int64_t* ld,
                                          ThreadMemory& scratch) {
  using X = typename Op::X;
  if constexpr (kTiles<T> && std::is_same_v<T, X>)
    if (K % 32 == 0) {
      *ld = stride;
      return x;
    }
  *ld = Op::stride(K);
  X* to = static_cast<X*>(scratch.get(size_t(rows) * *ld * sizeof(X)));
  for (int64_t r = 0; r < rows; ++r) prepare_row(x + r * stride, K, to + r * *ld);
  return to;
}

template <class T, class Weight = T>
struct Operand {
  using X = float;
  static int64_t depth(int64_t K) { return K; }
  static int64_t stride(int64_t K) { return row_stride<X>(K); }
  template <int R, int S>
  static void group(const X* x, int64_t ld, const Weight* const* w, int64_t K, Ahead ahead, float* c,
                    int64_t ldc) {
    micro<Weight, R, S>(x, ld, w, K, ahead, c, ldc);
  }
};

template <class Weight>
struct Operand<bf16, Weight> {
  static int64_t depth(int64_t K) { return padded_k(K); }
  using X = std::conditional_t<DFLASH_BF16_DOT, bf16, float>;
  static int64_t stride(int64_t K) { return kTiles<bf16> ? padded_k(K) : row_stride<X>(K); }
#if !defined(__AMX_BF16__)
  template <int R, int S>
  static void group(const X* x, int64_t ld, const Weight* const* w, int64_t K, Ahead ahead, float* c,
                    int64_t ldc) {
#if DFLASH_BF16_DOT
    micro_dot<R, S>(x, ld, w, K, ahead, c, ldc);
#else
    if constexpr (std::is_same_v<Weight, bf16>) micro_pairs<R, S>(x, ld, w, K, ahead, c, ldc);
    else micro<Weight, R, S>(x, ld, w, K, ahead, c, ldc);
#endif
  }
#endif
};

// ---- the walk over blocks
// --------------------------------------------------------------------------------------------

// Calls epilogue(c, ldc, r0, rows, n0) for every tile: c holds float32 sums, row r of the tile at c + r * ldc, for
// output rows r0 ... r0 + rows and outputs n0 ... n0 + 16.
template <class T, class Weight, int S, class Epilogue>
inline void tiles_of_blocks(const GemmParams& p, const typename Operand<T, Weight>::X* x, int64_t ld, int64_t r0,
                            int64_t rows, const int64_t* blocks, const Weight* const* w, Epilogue& epilogue) {
  const int64_t depth = Operand<T, Weight>::depth(p.K);
#if defined(__AMX_BF16__)
  if constexpr (kTiles<T>) {
    alignas(64) float c[kTileRows * S * kBlock];
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int m = int(rows - r < kTileRows ? rows - r : kTileRows);
      if (r == 0 || m != kTileRows) configure_tiles(m);
      micro_tiles<S>(x + r * ld, ld, w, depth, c);
      for (int s = 0; s < S; ++s) epilogue(c + s * kBlock, S * kBlock, r0 + r, m, blocks[s] * kBlock);
    }
    return;
  } else
#endif
  {
    alignas(64) float c[kPanelRows * S * kBlock];
    rows_by_blocks<Operand<T, Weight>, Weight, S>(x, ld, int(rows), w, depth, c, S * kBlock);
    for (int s = 0; s < S; ++s) epilogue(c + s * kBlock, S * kBlock, r0, int(rows), blocks[s] * kBlock);
  }
}

template <class T, class Weight, int S, class Epilogue>
inline void group_of_blocks(const GemmParams& p, const typename Operand<T, Weight>::X* x, int64_t ld, int64_t r0,
                            int64_t rows, const int64_t* blocks, ThreadMemory& packing, Epilogue& epilogue) {
  const Weight* w[S];
  const int64_t size = block_elements<Weight>(p.K);
  const auto* weight = static_cast<const Weight*>(p.weight);
  if (p.format != Format::none) {
    if constexpr (std::is_same_v<T, Weight>) {
      T* to = static_cast<T*>(packing.get(S * size * sizeof(T)));
      const int64_t pieces = p.K / kPiece, bytes = format_bytes(p.format, pieces);
      for (int s = 0; s < S; ++s) {
        const auto* from = static_cast<const uint8_t*>(p.weight) + blocks[s] * bytes;
        quant_widen({p.format, from, pieces, p.dtype, to + s * size});
        w[s] = to + s * size;
      }
    }
  } else if (p.weight_stride == 0) {
    for (int s = 0; s < S; ++s) w[s] = weight + blocks[s] * size;
#if defined(__AMX_BF16__)
    if constexpr (kTiles<T> && std::is_same_v<Weight, int8_t>)
      if (rows > kTileRows) {  // widened once for all tiles of rows
        T* to = static_cast<T*>(packing.get(S * size * sizeof(T)));
        const T* wide[S];
        for (int s = 0; s < S; wide[s] = to + s * size, ++s)
          for (int64_t at = 0; at < size; at += kTileElements) widen_tile(w[s] + at, to + s * size + at);
        return tiles_of_blocks<T, T, S>(p, x, ld, r0, rows, blocks, wide, epilogue);
      }
#endif
  } else if constexpr (std::is_same_v<T, Weight>) {
    T* to = static_cast<T*>(packing.get(S * size * sizeof(T)));
    for (int s = 0; s < S; ++s) {
      pack_block(weight, p.weight_stride, blocks[s] * kBlock, p.N, p.K, to + s * size);
      w[s] = to + s * size;
    }
  }
  tiles_of_blocks<T, Weight, S>(p, x, ld, r0, rows, blocks, w, epilogue);
}

// Blocks that each of the streams over [begin, end) walks, a multiple of `unit`; the rest are walked after them.
inline int64_t stream_length(int64_t begin, int64_t end, int64_t unit) {
  return (end - begin) / kStreams / unit * unit;
}

// Calls visit(blocks, count) for the groups of blocks in [begin, end), each count a constant.
template <int64_t UNIT = 1, class Visit>
inline void walk_blocks(int64_t begin, int64_t end, const Visit& visit) {
  const int64_t quarter = stream_length(begin, end, UNIT);
  for (int64_t i = 0; i < quarter; ++i) {
    const int64_t blocks[kStreams] = {begin + i, begin + quarter + i, begin + 2 * quarter + i, begin + 3 * quarter + i};
    visit(blocks, std::integral_constant<int, kStreams>{});
  }
  int64_t b = begin + quarter * kStreams;
  for (; b + 2 <= end; b += 2) {
    const int64_t blocks[2] = {b, b + 1};
    visit(blocks, std::integral_constant<int, 2>{});
  }
  if (b < end) visit(&b, std::integral_constant<int, 1>{});
}

// What a thread does after its last tile.
template <class T>
inline void release_tiles() {
#if defined(__AMX_BF16__)
  if (kTiles<T>) _tile_release();
#endif
}

template <class T, class Weight, int64_t UNIT, class Epilogue>
inline void gemm_blocks_of(const GemmParams& p, int64_t begin, int64_t end, Epilogue& epilogue) {
  static thread_local ThreadMemory rows_scratch, pack_scratch;
  for (int64_t r0 = 0; r0 < p.rows; r0 += kPanelRows) {
    const int64_t rows = p.rows - r0 < kPanelRows ? p.rows - r0 : kPanelRows;
    int64_t ld;
    const auto* x = prepare_rows<Operand<T, Weight>>(static_cast<const T*>(p.x.data) + r0 * p.x.stride, p.x.stride,
                                                     rows, p.K, &ld, rows_scratch);
    walk_blocks<UNIT>(begin, end, [&](const int64_t* blocks, auto count) {
      group_of_blocks<T, Weight, count>(p, x, ld, r0, rows, blocks, pack_scratch, epilogue);
    });
  }
  release_tiles<T>();
}

// The same walk with rows of x in int8: every thread rounds them itself, which takes less time than it would take to
// wait for another.
template <int64_t UNIT, class Epilogue>
inline void quant_blocks(const GemmParams& p, int64_t begin, int64_t end, Epilogue& epilogue) {
  static thread_local ThreadMemory scratch;
  const int64_t pieces = p.K / kPiece, bytes = format_bytes(p.format, pieces), itemsize = p.dtype == Dtype::f32 ? 4 : 2;
  alignas(64) float c[kPanelRows * kStreams * kBlock];
  for (int64_t r0 = 0; r0 < p.rows; r0 += kPanelRows) {
    const int64_t rows = p.rows - r0 < kPanelRows ? p.rows - r0 : kPanelRows;
    auto* x = static_cast<RowPiece*>(scratch.get(size_t(rows * pieces) * sizeof(RowPiece)));
    const char* from = static_cast<const char*>(p.x.data) + r0 * p.x.stride * itemsize;
    quant_rows({p.dtype, {from, p.x.stride}, rows, pieces, p.format, x});
    walk_blocks<UNIT>(begin, end, [&](const int64_t* blocks, int count) {
      const uint8_t* w[kStreams];
      for (int s = 0; s < count; ++s) w[s] = static_cast<const uint8_t*>(p.weight) + blocks[s] * bytes;
      quant_sums({p.format, x, rows, pieces, w, count, c, count * kBlock});
      for (int s = 0; s < count; ++s) epilogue(c + s * kBlock, count * kBlock, r0, int(rows), blocks[s] * kBlock);
    });
  }
}

// Blocks [begin, end) of the weight for all rows, on the calling thread. UNIT neighbours, counted from `begin`, are in
// one stream and come in order.
template <class T, int64_t UNIT = 1, class Epilogue>
inline void gemm_blocks(const GemmParams& p, int64_t begin, int64_t end, Epilogue& epilogue) {
  if (p.format != Format::none && !p.exact) return quant_blocks<UNIT>(p, begin, end, epilogue);
  if (p.scales) return gemm_blocks_of<T, int8_t, UNIT>(p, begin, end, epilogue);
  gemm_blocks_of<T, T, UNIT>(p, begin, end, epilogue);
}

// An epilogue's part of it: the tile's sums times the scales, plus the bias, to out.
template <class T, class Out>
inline void store_sums(const GemmParams& p, Out* out, int64_t stride, const float* c, int64_t ldc, int64_t r0, int rows,
                       int64_t n0) {
  const T* bias = static_cast<const T*>(p.bias);
  for (int r = 0; r < rows; ++r) {
    Out* to = out + (r0 + r) * stride + n0;
    for (int v = 0; v < kBlock && n0 + v < p.N; v += Vec::W) {
      const int m = int(p.N - n0 - v);
      Vec y = load(c + r * ldc + v);
      if (p.scales) y = y * load_n(p.scales + n0 + v, m);
      if (bias) y = y + load_n(bias + n0 + v, m);
      store_n(to + v, y, m);
    }
  }
}

inline int64_t gemm_block_count(const GemmParams& p) { return ceil_div(p.N, kBlock); }
// Fewer blocks than this are not worth waking a thread for: about 32 KB of weight.
inline int64_t gemm_grain(const GemmParams& p) { return 1 + 1024 / (p.K + 1); }

}  // namespace
}  // namespace dflash::DFLASH_ISA
