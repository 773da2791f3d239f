// The innermost loops of gemm.h with AMX: up to 16 rows of x against up to four blocks, a tile of 32 k at a time.
#pragma once

#include "cpu/amx.h"
#include "cpu/gemm_micro.h"

namespace dflash::DFLASH_ISA {
namespace {

#if defined(__AMX_BF16__)
// How far ahead of a stream its lines are asked for. A tile takes 16 lines at once: asking for the last of them and the
// next tile's first, tile by tile, was fastest; further ahead, or for four tiles in one go, costs a tenth. A tile of
// bytes takes half as long, and asking for the next two was fastest.
constexpr int64_t kTilePrefetchBytes = 384, kBytePrefetchBytes = 1024;

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
