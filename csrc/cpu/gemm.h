// The weight-streaming product behind `linear` and the heads: out = x W^T for few rows of x.
//
// Floor: the weight's bytes over the read bandwidth. W is packed so that 16 outputs form a block whose bytes lie in
// the order they are used ([N/16][K/2][16][2] for bf16, so that one 64-byte line holds a pair of k for 16 outputs and
// 16 lines are one AMX tile; [N/16][K][16] for f32, f16 and, K filled up to whole tiles, int8). Each thread walks a few
// blocks at once, an equal part of its range apart: a few long streams use more of the memory than one does.
//
// Every output is one accumulator that runs over k in order, so its bits depend on its row of x and its row of W
// alone: not on how many rows there are, how they are grouped into registers or tiles, or on the number of threads.
//
// An int8 weight is half of bf16's bytes and becomes x's type on its way into registers, exactly; its scales wait for
// the sums. Widening it takes about three cycles of a core for a line of 32, less than reading them does.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/gemm_params.h"
#include "cpu/memory.h"
#include "cpu/vec.h"

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#define DFLASH_BF16_DOT 1
#else
#define DFLASH_BF16_DOT 0
#endif

namespace dflash::DFLASH_ISA {

// What becomes of a tile's sums: called for every tile with float32 sums, row r of the tile at c + r * ldc, for output
// rows r0 ... r0 + rows and outputs n0 ... n0 + 16. It refers to a function object, which must outlive it.
class Epilogue {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<F, Epilogue>>>
  Epilogue(F& f)
      : self_(&f), call_([](void* self, const float* c, int64_t ldc, int64_t r0, int rows, int64_t n0) {
          (*static_cast<F*>(self))(c, ldc, r0, rows, n0);
        }) {}
  void operator()(const float* c, int64_t ldc, int64_t r0, int rows, int64_t n0) const {
    call_(self_, c, ldc, r0, rows, n0);
  }

 private:
  void* self_;
  void (*call_)(void*, const float*, int64_t, int64_t, int, int64_t);
};

// Blocks [begin, end) of the weight for all rows, on the calling thread. `unit` neighbours, counted from `begin`, are
// in one stream and come in order.
void gemm_blocks(const GemmParams& p, int64_t begin, int64_t end, int64_t unit, Epilogue epilogue);

// The same for rows that prepare_row has prepared, `ld` elements apart, of which x is the first: output rows
// r0 ... r0 + p.rows. The weight is one of elements.
void gemm_prepared(const GemmParams& p, const void* x, int64_t ld, int64_t r0, int64_t begin, int64_t end,
                   Epilogue epilogue);

namespace {

constexpr int kBlock = 16;  // outputs per packed block
constexpr int64_t kLine = 64;
#if defined(__AMX_BF16__)
constexpr int kStreams = 4;  // blocks walked at once
#else
constexpr int kStreams = 2;
#endif
constexpr int kPanelRows = 64;

// Whether products of T are of tiles.
template <class T> constexpr bool kTiles = false;
#if defined(__AMX_BF16__)
template <> constexpr bool kTiles<bf16> = true;
#endif

inline int64_t padded_k(int64_t K) { return ceil_div(K, 32) * 32; }

// Packed elements of one block.
template <class T> inline int64_t block_elements(int64_t K) { return kBlock * K; }
template <> inline int64_t block_elements<bf16>(int64_t K) { return kBlock * padded_k(K); }
template <> inline int64_t block_elements<int8_t>(int64_t K) { return kBlock * padded_k(K); }

// ---- rows of x, as the micro-kernels want them ----------------------------------------------------------------------

template <class T> using RowOf = std::conditional_t<std::is_same_v<T, bf16> && DFLASH_BF16_DOT, bf16, float>;

// Elements between rows: an odd number of cache lines, so that rows at one k are in different sets of the first-level
// cache, whatever K is.
template <class X> inline int64_t row_stride(int64_t K) {
  constexpr int64_t line = kLine / int64_t(sizeof(X));
  return (ceil_div(padded_k(K), line) | 1) * line;
}

// Between prepared rows.
template <class T> inline int64_t prepared_stride(int64_t K) {
  return kTiles<T> ? padded_k(K) : row_stride<RowOf<T>>(K);
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

// ---- around a product -----------------------------------------------------------------------------------------------

// Blocks that each of the streams over [begin, end) walks, a multiple of `unit`; the rest are walked after them.
inline int64_t stream_length(int64_t begin, int64_t end, int64_t unit) {
  return (end - begin) / kStreams / unit * unit;
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
