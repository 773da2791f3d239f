// The weight-streaming product behind `linear` and `lm_head_argmax`: out = x W^T for few rows of x.
//
// Floor: the weight's bytes over the read bandwidth. W is packed so that 16 outputs form a block whose bytes lie in
// the order they are used ([N/16][K/2][16][2] for bf16, so that one 64-byte line holds a pair of k for 16 outputs and
// 16 lines are one AMX tile; [N/16][K][16] for f32 and f16). Each thread walks four blocks at once, a quarter of its
// range apart: four long streams use more of the memory than one does.
//
// Every output is one accumulator that runs over k in order, so its bits depend on its row of x and its row of W
// alone: not on how many rows there are, how they are grouped into registers or tiles, or on the number of threads.
#pragma once

#include <cstdlib>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace dflash {

struct GemmParams {
  ConstRows x;
  int64_t rows, K, N;
  const void* weight;      // packed, or row-major (N, K) with rows weight_stride apart
  int64_t weight_stride;   // 0 when packed
  const void* bias;        // (N,) or null
  Dtype dtype;
};

}  // namespace dflash

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kBlock = 16;    // outputs per packed block
constexpr int kStreams = 4;   // blocks walked at once
constexpr int kTileRows = 16;
constexpr int kPanelRows = 64;
constexpr int64_t kPrefetchBytes = 2048;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded_k(int64_t K) { return ceil_div(K, 32) * 32; }

// Memory that a thread keeps between calls.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, size_);
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Packed elements of one block.
template <class T> inline int64_t block_elements(int64_t K) { return kBlock * K; }
template <> inline int64_t block_elements<bf16>(int64_t K) { return kBlock * padded_k(K); }

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

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#define DFLASH_BF16_DOT 1
#else
#define DFLASH_BF16_DOT 0
#endif

// ---- micro-kernels: C[r][s][16] for R rows and S blocks --------------------------------------------------------------

// x in float32, one row every `ldx`; w[s] packed.
template <class T, int R, int S>
inline void micro(const float* x, int64_t ldx, const T* const* w, int64_t K, float* c) {
  constexpr int V = kBlock / Vec::W;
  Vec acc[R][S][V];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s)
      for (int v = 0; v < V; ++v) acc[r][s][v] = set1(0.0f);
  for (int64_t k = 0; k < K; ++k)
    for (int s = 0; s < S; ++s) {
#if DFLASH_VEC
      _mm_prefetch((const char*)(w[s] + k * kBlock) + kPrefetchBytes, _MM_HINT_T0);
#endif
      for (int v = 0; v < V; ++v) {
        const Vec b = load(w[s] + k * kBlock + v * Vec::W);
        for (int r = 0; r < R; ++r) acc[r][s][v] = fma(set1(x[r * ldx + k]), b, acc[r][s][v]);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s)
      for (int v = 0; v < V; ++v) store(c + (r * S + s) * kBlock + v * Vec::W, acc[r][s][v]);
}

#if !DFLASH_BF16_DOT
// W pairs (lo, hi) of bf16 as two vectors.
inline void load_pairs(const bf16* p, Vec& lo, Vec& hi) {
#if DFLASH_VEC == 512
  const __m512i u = _mm512_loadu_si512(p);
  lo.v = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
  hi.v = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000))));
#elif DFLASH_VEC == 256
  const __m256i u = _mm256_loadu_si256((const __m256i*)p);
  lo.v = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
  hi.v = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(int(0xffff0000))));
#else
  for (int i = 0; i < Vec::W; ++i) lo.v[i] = to_float(p[2 * i]), hi.v[i] = to_float(p[2 * i + 1]);
#endif
}

template <int R, int S>
inline void micro_pairs(const float* x, int64_t ldx, const bf16* const* w, int64_t K, float* c) {
  constexpr int V = kBlock / Vec::W;
  Vec acc[R][S][V];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s)
      for (int v = 0; v < V; ++v) acc[r][s][v] = set1(0.0f);
  for (int64_t k = 0; k < K; k += 2)
    for (int s = 0; s < S; ++s) {
#if DFLASH_VEC
      _mm_prefetch((const char*)(w[s] + k * kBlock) + kPrefetchBytes, _MM_HINT_T0);
#endif
      for (int v = 0; v < V; ++v) {
        Vec lo, hi;
        load_pairs(w[s] + k * kBlock + 2 * v * Vec::W, lo, hi);
        for (int r = 0; r < R; ++r) {
          acc[r][s][v] = fma(set1(x[r * ldx + k]), lo, acc[r][s][v]);
          acc[r][s][v] = fma(set1(x[r * ldx + k + 1]), hi, acc[r][s][v]);
        }
      }
    }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s)
      for (int v = 0; v < V; ++v) store(c + (r * S + s) * kBlock + v * Vec::W, acc[r][s][v]);
}
#elif !defined(__AMX_BF16__)
// One vdpbf16ps per row, block and pair of k; x stays bf16.
template <int R, int S>
inline void micro_dot(const bf16* x, int64_t ldx, const bf16* const* w, int64_t K, float* c) {
  __m512 acc[R][S];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) acc[r][s] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2)
    for (int s = 0; s < S; ++s) {
      _mm_prefetch((const char*)(w[s] + k * kBlock) + kPrefetchBytes, _MM_HINT_T0);
      const __m512bh b = (__m512bh)_mm512_loadu_si512(w[s] + k * kBlock);
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, x + r * ldx + k, 4);
        acc[r][s] = _mm512_dpbf16_ps(acc[r][s], (__m512bh)_mm512_set1_epi32(pair), b);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) _mm512_storeu_ps(c + (r * S + s) * kBlock, acc[r][s]);
}
#else
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 accumulate, 4 holds x, 5-7 take turns with the weight. R rows of x and of each accumulator.
inline void configure_tiles(int R) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = t <= 4 ? R : 16;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}

template <int S>
inline void micro_tiles(const bf16* x, int64_t ldx, const bf16* const* w, int64_t K, float* c) {
  _tile_zero(0);
  if (S > 1) _tile_zero(1);
  if (S > 2) { _tile_zero(2); _tile_zero(3); }
  for (int64_t k = 0; k < K; k += 32) {
    for (int s = 0; s < S; ++s)
      for (int line = 0; line < 16; ++line)
        _mm_prefetch((const char*)(w[s] + k * kBlock) + kPrefetchBytes + 64 * line, _MM_HINT_T0);
    _tile_loadd(4, x + k, ldx * 2);
    _tile_loadd(5, w[0] + k * kBlock, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (S > 1) {
      _tile_loadd(6, w[1] + k * kBlock, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (S > 2) {
      _tile_loadd(7, w[2] + k * kBlock, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, w[3] + k * kBlock, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, S * kBlock * 4);
  if (S > 1) _tile_stored(1, c + kBlock, S * kBlock * 4);
  if (S > 2) {
    _tile_stored(2, c + 2 * kBlock, S * kBlock * 4);
    _tile_stored(3, c + 3 * kBlock, S * kBlock * 4);
  }
}
#endif

// ---- rows of x, as the micro-kernels want them -----------------------------------------------------------------------

template <class T>
struct Operand {  // f32 and f16 everywhere, bf16 without dot products: float32, zero past K
  using X = float;
  static int64_t depth(int64_t K) { return K; }
  static const float* prepare(const T* x, int64_t stride, int64_t rows, int64_t K, int64_t* ld, Scratch& scratch) {
    *ld = padded_k(K);
    float* to = static_cast<float*>(scratch.get(size_t(rows) * *ld * sizeof(float)));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < *ld; k += Vec::W) store(to + r * *ld + k, load_n(x + r * stride + k, int(K > k ? K - k : 0)));
    return to;
  }
  template <int S>
  static void tile(const float* x, int64_t ld, int rows, const T* const* w, int64_t K, float* c) {
    constexpr int kGroup = Vec::W == 16 ? 24 / (S < 3 ? 3 : S) : (S >= 4 ? 1 : 2);
    int r = 0;
    for (; r + kGroup <= rows; r += kGroup) group<kGroup, S>(x + r * ld, ld, w, K, c + r * S * kBlock);
    for (; r < rows; ++r) group<1, S>(x + r * ld, ld, w, K, c + r * S * kBlock);
  }
  template <int R, int S>
  static void group(const float* x, int64_t ld, const T* const* w, int64_t K, float* c) {
    micro<T, R, S>(x, ld, w, K, c);
  }
};

template <>
struct Operand<bf16> {
#if DFLASH_BF16_DOT
  using X = bf16;
#else
  using X = float;
#endif
  static int64_t depth(int64_t K) { return padded_k(K); }
  static const X* prepare(const bf16* x, int64_t stride, int64_t rows, int64_t K, int64_t* ld, Scratch& scratch) {
#if DFLASH_BF16_DOT
    if (K % 32 == 0) {
      *ld = stride;
      return x;
    }
    *ld = padded_k(K);
    bf16* to = static_cast<bf16*>(scratch.get(size_t(rows) * *ld * sizeof(bf16)));
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * *ld, x + r * stride, K * sizeof(bf16));
      std::memset(to + r * *ld + K, 0, (*ld - K) * sizeof(bf16));
    }
    return to;
#else
    *ld = padded_k(K);
    float* to = static_cast<float*>(scratch.get(size_t(rows) * *ld * sizeof(float)));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < *ld; k += Vec::W) store(to + r * *ld + k, load_n(x + r * stride + k, int(K > k ? K - k : 0)));
    return to;
#endif
  }
  template <int S>
  static void tile(const X* x, int64_t ld, int rows, const bf16* const* w, int64_t K, float* c) {
#if defined(__AMX_BF16__)
    (void)rows;
    micro_tiles<S>(x, ld, w, K, c);
#else
    constexpr int kGroup = DFLASH_BF16_DOT || Vec::W == 16 ? 24 / (S < 3 ? 3 : S) : (S >= 4 ? 1 : 2);
    int r = 0;
    for (; r + kGroup <= rows; r += kGroup) group<kGroup, S>(x + r * ld, ld, w, K, c + r * S * kBlock);
    for (; r < rows; ++r) group<1, S>(x + r * ld, ld, w, K, c + r * S * kBlock);
  }
  template <int R, int S>
  static void group(const X* x, int64_t ld, const bf16* const* w, int64_t K, float* c) {
#if DFLASH_BF16_DOT
    micro_dot<R, S>(x, ld, w, K, c);
#else
    micro_pairs<R, S>(x, ld, w, K, c);
#endif
#endif
  }
};

// ---- the walk over blocks --------------------------------------------------------------------------------------------

// Calls epilogue(c, ldc, r0, rows, n0, s) for every tile: c holds float32 sums, row r of the tile at c + r * ldc, for
// output rows r0 ... r0 + rows and outputs n0 ... n0 + 16.
template <class T, int S, class Epilogue>
inline void group_of_blocks(const GemmParams& p, const typename Operand<T>::X* x, int64_t ld, int64_t r0, int64_t rows,
                            const int64_t* blocks, Scratch& packing, Epilogue& epilogue) {
  const T* w[S];
  const int64_t size = block_elements<T>(p.K);
  if (p.weight_stride == 0) {
    for (int s = 0; s < S; ++s) w[s] = static_cast<const T*>(p.weight) + blocks[s] * size;
  } else {
    T* to = static_cast<T*>(packing.get(S * size * sizeof(T) + kPrefetchBytes));
    for (int s = 0; s < S; ++s) {
      pack_block(static_cast<const T*>(p.weight), p.weight_stride, blocks[s] * kBlock, p.N, p.K, to + s * size);
      w[s] = to + s * size;
    }
  }
  alignas(64) float c[kTileRows * S * kBlock];
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int m = int(rows - r < kTileRows ? rows - r : kTileRows);
#if defined(__AMX_BF16__)
    if (sizeof(T) == 2 && (r == 0 || m != kTileRows)) configure_tiles(m);
#endif
    Operand<T>::template tile<S>(x + r * ld, ld, m, w, Operand<T>::depth(p.K), c);
    for (int s = 0; s < S; ++s) epilogue(c + s * kBlock, S * kBlock, r0 + r, m, blocks[s] * kBlock);
  }
}

// Blocks [begin, end) of the weight for all rows, on the calling thread.
template <class T, class Epilogue>
inline void gemm_blocks(const GemmParams& p, int64_t begin, int64_t end, Epilogue& epilogue) {
  static thread_local Scratch rows_scratch, pack_scratch;
  for (int64_t r0 = 0; r0 < p.rows; r0 += kPanelRows) {
    const int64_t rows = p.rows - r0 < kPanelRows ? p.rows - r0 : kPanelRows;
    int64_t ld;
    const auto* x =
        Operand<T>::prepare(static_cast<const T*>(p.x.data) + r0 * p.x.stride, p.x.stride, rows, p.K, &ld, rows_scratch);
    const int64_t quarter = (end - begin) / kStreams;
    for (int64_t i = 0; i < quarter; ++i) {
      const int64_t blocks[kStreams] = {begin + i, begin + quarter + i, begin + 2 * quarter + i, begin + 3 * quarter + i};
      group_of_blocks<T, kStreams>(p, x, ld, r0, rows, blocks, pack_scratch, epilogue);
    }
    int64_t b = begin + quarter * kStreams;
    for (; b + 2 <= end; b += 2) {
      const int64_t blocks[2] = {b, b + 1};
      group_of_blocks<T, 2>(p, x, ld, r0, rows, blocks, pack_scratch, epilogue);
    }
    if (b < end) group_of_blocks<T, 1>(p, x, ld, r0, rows, &b, pack_scratch, epilogue);
  }
#if defined(__AMX_BF16__)
  if (sizeof(T) == 2) _tile_release();
#endif
}

inline int64_t gemm_block_count(const GemmParams& p) { return ceil_div(p.N, kBlock); }
// Fewer blocks than this are not worth waking a thread for: about 32 KB of weight.
inline int64_t gemm_grain(const GemmParams& p) { return 1 + 1024 / (p.K + 1); }

}  // namespace
}  // namespace dflash::DFLASH_ISA
