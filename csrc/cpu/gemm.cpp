#include "cpu/gemm.h"

#include "cpu/gemm_rows.h"
#include "cpu/gemm_three.h"
#include "cpu/gemm_tiles.h"
#include "cpu/quant.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kTileRows = 16;

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

// `rows` rows of x, prepared.
template <class T>
inline const RowOf<T>* prepare_rows(const T* x, int64_t stride, int64_t rows, int64_t K, int64_t* ld,
                                    ThreadMemory& scratch) {
  if constexpr (kTiles<T>)
    if (K % 32 == 0) {
      *ld = stride;
      return x;
    }
  *ld = prepared_stride<T>(K);
  auto* to = static_cast<RowOf<T>*>(scratch.get(size_t(rows) * *ld * sizeof(RowOf<T>)));
  for (int64_t r = 0; r < rows; ++r) prepare_row(x + r * stride, K, to + r * *ld);
  return to;
}

template <class T, class Weight>
struct Operand {
  using X = RowOf<T>;
  static int64_t depth(int64_t K) { return std::is_same_v<T, bf16> ? padded_k(K) : K; }
  template <int R, int S>
  static void group(const X* x, int64_t ld, const Weight* const* w, int64_t K, Ahead ahead, Place sums) {
#if DFLASH_VEC == 256
    if constexpr (std::is_same_v<Weight, bf16> && R == 3 && S == 2) micro_three(x, ld, w, K, ahead, sums);
    else
#endif
#if !DFLASH_BF16_DOT
    if constexpr (std::is_same_v<Weight, bf16>) micro_pairs<R, S>(x, ld, w, K, ahead, sums);
    else
#elif !defined(__AMX_BF16__)
    if constexpr (std::is_same_v<X, bf16>) micro_dot<R, S>(x, ld, w, K, ahead, sums);
    else
#endif
      micro<Weight, R, S>(x, ld, w, K, ahead, sums);
  }
};

// The neighbouring blocks that so many rows meet at once, in order; 0: those of several streams.
template <class T, class Weight>
inline int neighbours(int64_t rows) {
  if (kTiles<T> || !in_one_stream<RowOf<T>, Weight>(rows)) return 0;
  return in_pairs(rows) ? kPairBlocks : 1;
}

// ---- the walk over blocks -------------------------------------------------------------------------------------------

template <class T, class Weight, int S>
inline void tiles_of_blocks(const GemmParams& p, const RowOf<T>* x, int64_t ld, int64_t r0,
                            int64_t rows, const int64_t* blocks, const Weight* const* w, Epilogue epilogue) {
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

template <class T, class Weight, int S>
inline void group_of_blocks(const GemmParams& p, const RowOf<T>* x, int64_t ld, int64_t r0,
                            int64_t rows, const int64_t* blocks, ThreadMemory& packing, Epilogue epilogue) {
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

// Calls visit(blocks, count) for the groups of blocks in [begin, end), each count a constant: one block of each stream,
// then the rest; or `neighbours` in order.
template <class Visit>
inline void walk_blocks(int64_t begin, int64_t end, int64_t unit, int neighbours, const Visit& visit) {
  int64_t b = begin;
  const auto next = [&](auto count) {
    int64_t blocks[count];
    times<count>([&](auto s) { blocks[s] = b + s; });
    visit(blocks, count);
    b += count;
  };
  if (neighbours == 0) {
    const int64_t length = stream_length(begin, end, unit);
    for (; b < begin + length; ++b) {
      int64_t blocks[kStreams];
      times<kStreams>([&](auto s) { blocks[s] = b + s * length; });
      visit(blocks, std::integral_constant<int, kStreams>{});
    }
    b = begin + length * kStreams;
    while (b + 2 <= end) next(std::integral_constant<int, 2>{});
  }
#if DFLASH_VEC == 256
  while (neighbours == kPairBlocks && b + kPairBlocks <= end) next(std::integral_constant<int, kPairBlocks>{});
#endif
  while (b < end) next(std::integral_constant<int, 1>{});
}

// What a thread does after its last tile.
template <class T>
inline void release_tiles() {
#if defined(__AMX_BF16__)
  if (kTiles<T>) _tile_release();
#endif
}

template <class T, class Weight>
void blocks_of(const GemmParams& p, int64_t begin, int64_t end, int64_t unit, Epilogue epilogue) {
  static thread_local ThreadMemory rows_scratch, pack_scratch;
  for (int64_t r0 = 0; r0 < p.rows; r0 += kPanelRows) {
    const int64_t rows = p.rows - r0 < kPanelRows ? p.rows - r0 : kPanelRows;
    int64_t ld;
    const auto* x = prepare_rows<T>(static_cast<const T*>(p.x.data) + r0 * p.x.stride, p.x.stride, rows, p.K, &ld,
                                    rows_scratch);
    walk_blocks(begin, end, unit, neighbours<T, Weight>(rows), [&](const int64_t* blocks, auto count) {
      group_of_blocks<T, Weight, count>(p, x, ld, r0, rows, blocks, pack_scratch, epilogue);
    });
  }
  release_tiles<T>();
}

// A block stays in the second-level cache where it meets more rows than a panel.
template <class T, class Weight>
void prepared_of(const GemmParams& p, const RowOf<T>* x, int64_t ld, int64_t r0, int64_t begin, int64_t end,
                 Epilogue epilogue) {
  static thread_local ThreadMemory packing;
  walk_blocks(begin, end, 1, neighbours<T, Weight>(p.rows), [&](const int64_t* blocks, auto count) {
    for (int64_t r = 0; r < p.rows; r += kPanelRows)
      group_of_blocks<T, Weight, count>(p, x + r * ld, ld, r0 + r, p.rows - r < kPanelRows ? p.rows - r : kPanelRows,
                                        blocks, packing, epilogue);
  });
  release_tiles<T>();
}

// Asks for the first lines of every stream.
inline void ask_first(const void* weight, int64_t block_bytes, int64_t begin, int64_t length) {
  constexpr int64_t lines = 64;
  const int64_t bytes = length * block_bytes < lines * kLine ? length * block_bytes : lines * kLine;
  const char* first = static_cast<const char*>(weight) + begin * block_bytes;
  for (int64_t at = 0; at < bytes; at += kLine)
    for (int64_t s = 0; s < kStreams; ++s) ask(first + s * length * block_bytes + at);
}

// The walk of blocks_of with rows of x in int8: every thread rounds them itself, which takes less time than waiting for
// another would. Meanwhile the first reads are under way.
void quant_blocks(const GemmParams& p, int64_t begin, int64_t end, int64_t unit, Epilogue epilogue) {
  static thread_local ThreadMemory scratch;
  const int64_t pieces = p.K / kPiece, bytes = format_bytes(p.format, pieces), itemsize = p.dtype == Dtype::f32 ? 4 : 2;
  alignas(64) float c[kPanelRows * kStreams * kBlock];
  ask_first(p.weight, bytes, begin, stream_length(begin, end, unit));
  for (int64_t r0 = 0; r0 < p.rows; r0 += kPanelRows) {
    const int64_t rows = p.rows - r0 < kPanelRows ? p.rows - r0 : kPanelRows;
    auto* x = static_cast<RowPiece*>(scratch.get(size_t(rows * pieces) * sizeof(RowPiece)));
    const char* from = static_cast<const char*>(p.x.data) + r0 * p.x.stride * itemsize;
    best_of(quant_rows_kernels, p.isa)({p.dtype, {from, p.x.stride}, rows, pieces, p.format, x});
    walk_blocks(begin, end, unit, 0, [&](const int64_t* blocks, int count) {
      const uint8_t* w[kStreams];
      for (int s = 0; s < count; ++s) w[s] = static_cast<const uint8_t*>(p.weight) + blocks[s] * bytes;
      best_of(quant_sums_kernels, p.isa)({p.format, x, rows, pieces, w, count, c});
      for (int s = 0; s < count; ++s) epilogue(c + s * rows * kBlock, kBlock, r0, int(rows), blocks[s] * kBlock);
    });
  }
}

template <class T>
void blocks_of(const GemmParams& p, int64_t begin, int64_t end, int64_t unit, Epilogue epilogue) {
  if (p.scales) return blocks_of<T, int8_t>(p, begin, end, unit, epilogue);
  blocks_of<T, T>(p, begin, end, unit, epilogue);
}

template <class T>
void prepared_of(const GemmParams& p, const void* x, int64_t ld, int64_t r0, int64_t begin, int64_t end,
                 Epilogue epilogue) {
  const auto* rows = static_cast<const RowOf<T>*>(x);
  if (p.scales) return prepared_of<T, int8_t>(p, rows, ld, r0, begin, end, epilogue);
  prepared_of<T, T>(p, rows, ld, r0, begin, end, epilogue);
}

}  // namespace

void gemm_blocks(const GemmParams& p, int64_t begin, int64_t end, int64_t unit, Epilogue epilogue) {
  if (p.format != Format::none && !p.exact) return quant_blocks(p, begin, end, unit, epilogue);
  switch (p.dtype) {
    case Dtype::f32: return blocks_of<float>(p, begin, end, unit, epilogue);
    case Dtype::bf16: return blocks_of<bf16>(p, begin, end, unit, epilogue);
    case Dtype::f16: return blocks_of<f16>(p, begin, end, unit, epilogue);
  }
}

void gemm_prepared(const GemmParams& p, const void* x, int64_t ld, int64_t r0, int64_t begin, int64_t end,
                   Epilogue epilogue) {
  switch (p.dtype) {
    case Dtype::f32: return prepared_of<float>(p, x, ld, r0, begin, end, epilogue);
    case Dtype::bf16: return prepared_of<bf16>(p, x, ld, r0, begin, end, epilogue);
    case Dtype::f16: return prepared_of<f16>(p, x, ld, r0, begin, end, epilogue);
  }
}

}  // namespace dflash::DFLASH_ISA
