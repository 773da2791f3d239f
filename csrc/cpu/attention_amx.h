// The inner loops of block_attention on AMX tiles, for bf16 with D a multiple of 32.
//
// Products of bf16 are exact and sums are float32, but a weight is rounded to bf16 before it meets a value, as flash
// attention does on GPUs. A tile row never mixes with another, and key groups stand at absolute multiples of 32, so a
// row's bits depend on that row alone here too. A weight of zero times a finite value adds nothing; values that are not
// finite are reported, and the caller then gives each row a copy in which the keys that it does not see are zero.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_work.h"

#if defined(__AMX_BF16__)
#define DFLASH_ATTENTION_AMX 1
#else
#define DFLASH_ATTENTION_AMX 0
#endif

namespace dflash::DFLASH_ISA {
namespace {

template <class T>
constexpr bool kHasTiles = false;

#if !DFLASH_ATTENTION_AMX
inline void open_tiles() {}
inline void close_tiles() {}
#else
template <>
constexpr bool kHasTiles<bf16> = true;

constexpr int kGroup = 32;  // keys of one multiplication by values

// The tile intrinsics do not tell the compiler that they read memory.
inline void memory_is_read(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

inline void open_tiles() { configure_tiles(16); }
inline void close_tiles() { _tile_release(); }

// 16 rows of D -> pairs[d / 2][row][2].
inline void pack_queries(const bf16* const* rows, int D, bf16* pairs) {
  for (int d = 0; d < D; d += 32) {
    Vec x[16];
    for (int i = 0; i < 16; ++i) x[i] = load(reinterpret_cast<const float*>(rows[i] + d));
    transpose(x);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(pairs + (d / 2 + i) * 32, x[i].v);
  }
}

// Sixteen keys as a tile wants them: rows a fixed distance apart.
struct KeyRows {
  const bf16* first;
  int64_t bytes;  // from one to the next
};

// The keys in place where a page holds all sixteen in order, else a copy in `to` (16, D).
inline KeyRows sixteen_keys(const bf16* const* keys, int D, bf16* to) {
  // As numbers: rows may lie in different allocations.
  const auto address = [&](int j) { return reinterpret_cast<uintptr_t>(keys[j]); };
  const uintptr_t step = address(1) - address(0);
  bool in_place = step != 0;
  for (int j = 1; j < 16; ++j) in_place &= address(j) - address(0) == j * step;
  if (in_place) return {keys[0], static_cast<int64_t>(step)};
  for (int j = 0; j < 16; ++j)
    for (int d = 0; d < D; d += 32) _mm512_storeu_si512(to + j * D + d, _mm512_loadu_si512(keys[j] + d));
  return {to, D * 2};
}

// s[r][key] for kTile keys, rows of 16: keys times packed queries.
inline void scores_amx(const KeyRows* keys, const bf16* queries, int rows, int D, const float* scale, float softcap,
                       float* s) {
  alignas(64) float c[kTile][16];
  memory_is_read(keys);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int d = 0; d < D; d += 32) {
    _tile_loadd(7, queries + d * 16, 64);
    _tile_loadd(4, keys[0].first + d, keys[0].bytes);
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(5, keys[1].first + d, keys[1].bytes);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, keys[2].first + d, keys[2].bytes);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(4, keys[3].first + d, keys[3].bytes);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[16], 64);
  _tile_stored(2, c[32], 64);
  _tile_stored(3, c[48], 64);
  for (int j = 0; j < kTile; j += 16) {
    Vec x[16];
    for (int i = 0; i < 16; ++i) x[i] = load(c[j + i]);
    transpose(x);
    for (int r = 0; r < 16; ++r) {
      if (r >= rows) break;
      Vec y = x[r] * load(scale + j);
      if (softcap > 0) y = vtanh(y / set1(softcap)) * set1(softcap);
      store(s + r * kSplit + j, y);
    }
  }
}

// Values of keys [begin, end) as pairs[group][d / 16][key / 2][d % 16][2]; the groups' other keys become zero.
// True when some value is not finite.
inline bool pack_values(const bf16* const* rows, int begin, int end, int D, bf16* pairs) {
  alignas(64) uint16_t low[32], high[32];
  for (int i = 0; i < 16; ++i) {
    low[2 * i] = uint16_t(i);
    low[2 * i + 1] = uint16_t(32 + i);
    high[2 * i] = uint16_t(16 + i);
    high[2 * i + 1] = uint16_t(48 + i);
  }
  const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
  const __m512i infinity = _mm512_set1_epi16(0x7f80), magnitude = _mm512_set1_epi16(0x7fff);
  __mmask32 bad = 0;
  for (int j = begin & -kGroup; j < end; j += 2) {
    bf16* to = pairs + (j / kGroup * (D / 16) * 16 + j % kGroup / 2) * 32;
    const bool even = j >= begin, odd = j + 1 >= begin && j + 1 < end;
    for (int d = 0; d < D; d += 32) {
      const __m512i a = even ? _mm512_loadu_si512(rows[j] + d) : _mm512_setzero_si512();
      const __m512i b = odd ? _mm512_loadu_si512(rows[j + 1] + d) : _mm512_setzero_si512();
      bad |= _mm512_cmpge_epu16_mask(_mm512_and_si512(a, magnitude), infinity);
      bad |= _mm512_cmpge_epu16_mask(_mm512_and_si512(b, magnitude), infinity);
      _mm512_storeu_si512(to + d / 16 * 512, _mm512_permutex2var_epi16(a, to_low, b));
      _mm512_storeu_si512(to + (d / 16 + 1) * 512, _mm512_permutex2var_epi16(a, to_high, b));
    }
  }
  for (int j = (end + 1) & -2; j < ((end + kGroup - 1) & -kGroup); j += 2)
    for (int d = 0; d < D; d += 16)
      _mm512_storeu_si512(pairs + ((j / kGroup * (D / 16) + d / 16) * 16 + j % kGroup / 2) * 32,
                          _mm512_setzero_si512());
  return bad != 0;
}

// acc[row][d] = weights (rows, kSplit) times packed values over the groups that hold keys [begin, end).
inline void weigh_amx(const bf16* weights, const bf16* pairs, int begin, int end, bool two, int D, int64_t stride,
                      float* acc) {
  const int from = begin / kGroup, to = (end + kGroup - 1) / kGroup;
  memory_is_read(weights);
  for (int d = 0; d < D; d += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int g = from; g < to; ++g) {
      const bf16* v = pairs + (g * (D / 16) + d / 16) * 512;
      _tile_loadd(4, weights + g * kGroup, kSplit * 2);
      _tile_loadd(6, v, 64);
      _tile_loadd(7, v + 512, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!two) continue;
      _tile_loadd(5, weights + 16 * kSplit + g * kGroup, kSplit * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, acc + d, stride * 4);
    _tile_stored(1, acc + d + 16, stride * 4);
    if (!two) continue;
    _tile_stored(2, acc + 16 * stride + d, stride * 4);
    _tile_stored(3, acc + 16 * stride + d + 16, stride * 4);
  }
}

inline void prefetch_near(const bf16* row, int D) {
  for (int d = 0; d < D; d += 32) _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
}

// One split for `count` rows: row r sees keys [lo[r], hi[r]), and [begin, end) is what they see together.
inline void split_amx(const AttentionParams& p, int count, int begin, int end, const int* lo, const int* hi,
                     const bf16* const* keys, const bf16* const* values, const float* value_scale,
                     const Scratch& w, const State& out) {
  const int D = int(p.head_dim);
  const int64_t stride = padded(D);
  bf16* rows = reinterpret_cast<bf16*>(w.keys);
  // The next tile's keys and this one's values are asked for while this one's keys are multiplied.
  for (int j = begin; j < end && j < (begin & -kTile) + kTile; ++j) prefetch_near(keys[j], D);
  for (int tile = begin & -kTile; tile < end; tile += kTile) {
    for (int j = tile; j < tile + kTile; ++j) {
      if (j + kTile < end) prefetch_near(keys[j + kTile], D);
      if (j >= begin && j < end) prefetch_near(values[j], D);
    }
    KeyRows sixteens[kTile / 16];
    for (int i = 0; i < kTile / 16; ++i) sixteens[i] = sixteen_keys(keys + tile + 16 * i, D, rows + 16 * i * D);
    for (int r = 0; r < count; r += 16)
      scores_amx(sixteens, w.packed_q + r * D, count - r, D, w.key_scale + tile, p.softcap, w.s + r * kSplit + tile);
  }
  const bool two = count > 16;
  bool all_see_all = true;
  std::memset(w.weights, 0, size_t(two ? 32 : 16) * kSplit * sizeof(bf16));
  for (int r = 0; r < count; ++r) {
    all_see_all &= lo[r] == begin && hi[r] == end;
    if (lo[r] >= hi[r]) continue;
    float* s = w.s + r * kSplit;
    softmax(s, lo[r], hi[r], value_scale, s, out.max + r, out.sum + r);
    for (int j = lo[r] & -W; j < hi[r]; j += W) store(w.weights + r * kSplit + j, load(s + j));
  }
  if (!pack_values(values, begin, end, D, w.packed_v) || all_see_all)
    return weigh_amx(w.weights, w.packed_v, begin, end, two, D, stride, out.acc);
  for (int r = 0; r < count; ++r) {
    if (lo[r] >= hi[r]) continue;
    pack_values(values, lo[r], hi[r], D, w.packed_v);
    weigh_amx(w.weights, w.packed_v, lo[r], hi[r], two, D, stride, w.values);
    std::memcpy(out.acc + r * stride, w.values + r * stride, size_t(D) * sizeof(float));
  }
}
#endif

}  // namespace
}  // namespace dflash::DFLASH_ISA
