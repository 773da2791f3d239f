// The innermost loops of gemm.h: sums of a few rows of x against a few packed blocks of 16 outputs, one flavour per
// instruction set. Each keeps one accumulator per (row, output) and runs over k in order.
#pragma once

#include "cpu/amx.h"
#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kBlock = 16;    // outputs per packed block
// How far ahead of a stream its lines are asked for. A tile takes 16 lines at once: asking for the last of them and the
// next tile's first, tile by tile, was fastest; further ahead, or for four tiles in one go, costs a tenth. A tile of
// bytes takes half as long, and asking for the next two was fastest.
constexpr int64_t kPrefetchBytes = 2048, kTilePrefetchBytes = 384, kBytePrefetchBytes = 1024;

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#define DFLASH_BF16_DOT 1
#else
#define DFLASH_BF16_DOT 0
#endif

template <class T> constexpr bool kTiles = false;
#if defined(__AMX_BF16__)
template <> constexpr bool kTiles<bf16> = true;
#endif

// Each leaves its sums at c[r * ldc + s * 16 + j].

// x in float32, one row every `ldx`; w[s] packed.
template <class T, int R, int S>
inline void micro(const float* x, int64_t ldx, const T* const* w, int64_t K, float* c, int64_t ldc) {
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
      for (int v = 0; v < V; ++v) store(c + r * ldc + s * kBlock + v * Vec::W, acc[r][s][v]);
}

#if DFLASH_BF16_DOT
// Two k of 16 outputs as pairs of bf16, which has every int8: a float's upper half is all of it.
inline __m512i load_pairs(const int8_t* p) {
  const auto half = [&](int h) { return _mm512_castps_si512(load(p + h * kBlock).v); };
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(half(0), 16), half(1));
}
#endif

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
inline void micro_pairs(const float* x, int64_t ldx, const bf16* const* w, int64_t K, float* c, int64_t ldc) {
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
      for (int v = 0; v < V; ++v) store(c + r * ldc + s * kBlock + v * Vec::W, acc[r][s][v]);
}
#elif !defined(__AMX_BF16__)
inline __m512i load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }

// One vdpbf16ps per row, block and pair of k; x stays bf16.
template <int R, int S, class Weight>
inline void micro_dot(const bf16* x, int64_t ldx, const Weight* const* w, int64_t K, float* c, int64_t ldc) {
  __m512 acc[R][S];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) acc[r][s] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2)
    for (int s = 0; s < S; ++s) {
      _mm_prefetch((const char*)(w[s] + k * kBlock) + kPrefetchBytes, _MM_HINT_T0);
      const __m512bh b = (__m512bh)load_pairs(w[s] + k * kBlock);
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, x + r * ldx + k, 4);
        acc[r][s] = _mm512_dpbf16_ps(acc[r][s], (__m512bh)_mm512_set1_epi32(pair), b);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) _mm512_storeu_ps(c + r * ldc + s * kBlock, acc[r][s]);
}
#else
constexpr int64_t kTileElements = 32 * kBlock;

template <int S>
inline void store_tiles(float* c) {
  _tile_stored(0, c, S * kBlock * 4);
  if (S > 1) _tile_stored(1, c + kBlock, S * kBlock * 4);
  if (S > 2) {
    _tile_stored(2, c + 2 * kBlock, S * kBlock * 4);
    _tile_stored(3, c + 3 * kBlock, S * kBlock * 4);
  }
}

inline void widen_tile(const int8_t* w, bf16* to) {
  for (int64_t at = 0; at < kTileElements; at += 64)
    _mm_prefetch((const char*)w + kBytePrefetchBytes + at, _MM_HINT_T0);
#pragma GCC unroll 16
  for (int64_t at = 0; at < kTileElements; at += 2 * kBlock) _mm512_store_si512(to + at, load_pairs(w + at));
}

// Widens a tile of each stream while the one before it is multiplied.
template <int S>
inline void micro_tiles(const bf16* x, int64_t ldx, const int8_t* const* w, int64_t K, float* c) {
  alignas(64) bf16 wide[2][S][kTileElements];
  for (int s = 0; s < S; ++s) widen_tile(w[s], wide[0][s]);
  _tile_zero(0);
  if (S > 1) _tile_zero(1);
  if (S > 2) { _tile_zero(2); _tile_zero(3); }
  for (int64_t k = 0; k < K; k += 32) {
    const auto now = wide[k / 32 % 2];
    const auto ahead = [&](int s) {
      if (k + 32 < K) widen_tile(w[s] + (k + 32) * kBlock, wide[(k / 32 + 1) % 2][s]);
    };
    _tile_loadd(4, x + k, ldx * 2);
    _tile_loadd(5, now[0], 64);
    _tile_dpbf16ps(0, 4, 5);
    ahead(0);
    if (S > 1) {
      _tile_loadd(6, now[1], 64);
      _tile_dpbf16ps(1, 4, 6);
      ahead(1);
    }
    if (S > 2) {
      _tile_loadd(7, now[2], 64);
      _tile_dpbf16ps(2, 4, 7);
      ahead(2);
      _tile_loadd(5, now[3], 64);
      _tile_dpbf16ps(3, 4, 5);
      ahead(3);
    }
  }
  store_tiles<S>(c);
}

template <int S>
inline void micro_tiles(const bf16* x, int64_t ldx, const bf16* const* w, int64_t K, float* c) {
  _tile_zero(0);
  if (S > 1) _tile_zero(1);
  if (S > 2) { _tile_zero(2); _tile_zero(3); }
  for (int64_t k = 0; k < K; k += 32) {
    const auto ask_ahead = [&](int s) {
      for (int line = 0; line < 16; ++line)
        _mm_prefetch((const char*)(w[s] + k * kBlock) + kTilePrefetchBytes + 64 * line, _MM_HINT_T0);
    };
    _tile_loadd(4, x + k, ldx * 2);
    ask_ahead(0);
    _tile_loadd(5, w[0] + k * kBlock, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (S > 1) {
      ask_ahead(1);
      _tile_loadd(6, w[1] + k * kBlock, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (S > 2) {
      ask_ahead(2);
      _tile_loadd(7, w[2] + k * kBlock, 64);
      _tile_dpbf16ps(2, 4, 7);
      ask_ahead(3);
      _tile_loadd(5, w[3] + k * kBlock, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  store_tiles<S>(c);
}
#endif

}  // namespace
}  // namespace dflash::DFLASH_ISA
