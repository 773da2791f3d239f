// The innermost loops of gemm.h: sums of a few rows of x against a few packed blocks of 16 outputs, one flavour per
// instruction set. Each keeps one accumulator per (row, output) and runs over k in order.
//
// An element of x is broadcast once for all blocks and a weight loaded once for all rows: R rows by S blocks take R + S
// loads for R * S multiply-adds, fewer than a core can do beside them.
#pragma once

#include <utility>

#include "cpu/gemm.h"

#define DFLASH_INLINE __attribute__((always_inline))
#define DFLASH_NOINLINE __attribute__((noinline))  // inlined, a loop would share its registers with what is around it

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kBlockVectors = kBlock / Vec::W;
template <class T> constexpr int kLineDepth = kLine / (kBlock * int(sizeof(T)));  // k of a block in one cache line

// f(0) ... f(N - 1), each a constant: what it indexes is then not an array to the compiler, but registers.
template <class F, int... I>
inline DFLASH_INLINE void times(F&& f, std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
template <int N, class F>
inline DFLASH_INLINE void times(F&& f) { times(f, std::make_integer_sequence<int, N>{}); }

// Asks for a line, into the second-level cache: the first has few buffers for what is on its way, and the loads that
// follow hit the second, which takes no longer than the arithmetic that is under way. In place, or the compiler drops a
// function that only asks.
inline DFLASH_INLINE void ask([[maybe_unused]] const void* line) {
#if DFLASH_VEC
  _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1);
#endif
}

// What a loop asks memory for on its way: from w[s] + at on, in bytes, `step` further with each line that it uses.
struct Ahead {
  int64_t at, step;

  template <int S, class Weight>
  DFLASH_INLINE void ask_each(const Weight* const* w) {
    for (int s = 0; s < S; ++s) ask(reinterpret_cast<const char*>(w[s]) + at);
    at += step;
  }
};

// Where sums lie in memory between chunks of K, c[r * ldc + s * 16 + j]. fresh: they begin at zero.
struct Place {
  float* c;
  int64_t ldc;
  bool fresh;
};

// R rows of C vectors of sums.
template <int R, int C>
struct Sums {
  Vec v[R * C];

  DFLASH_INLINE Sums(Place from) {
    times<R>([&](auto r) {
      times<C>([&](auto i) { v[r * C + i] = from.fresh ? set1(0.0f) : load(from.c + r * from.ldc + i * Vec::W); });
    });
  }
  DFLASH_INLINE void store_to(Place to) const {
    times<R>([&](auto r) { times<C>([&](auto i) { store(to.c + r * to.ldc + i * Vec::W, v[r * C + i]); }); });
  }
  // Adds x(row) times b(column), and holds the fewer of the two.
  template <class X, class B>
  DFLASH_INLINE void add(X x, B b) {
    if constexpr (R < C) {
      Vec a[R];
      times<R>([&](auto r) { a[r] = set1(x(r)); });
      times<C>([&](auto i) {
        const Vec of = b(i);
        times<R>([&](auto r) { v[r * C + i] = fma(a[r], of, v[r * C + i]); });
      });
      return;
    }
    Vec of[C];
    times<C>([&](auto i) { of[i] = b(i); });
    times<R>([&](auto r) {
      const Vec a = set1(x(r));
      times<C>([&](auto i) { v[r * C + i] = fma(a, of[i], v[r * C + i]); });
    });
  }
};

// The loops: x one row every `ldx`, w[s] packed.

// x in float32
template <class T, int R, int S>
DFLASH_NOINLINE void micro(const float* x, int64_t ldx, const T* const* w, int64_t K, Ahead ahead,
                           Place place) {
  constexpr int V = kBlockVectors;
  Sums<R, S * V> sums(place);
  int64_t k = 0;
  for (; k + kLineDepth<T> <= K; k += kLineDepth<T>) {
    ahead.ask_each<S>(w);
    times<kLineDepth<T>>([&](auto d) {
      sums.add([&](int r) { return x[r * ldx + k + d]; },
               [&](int i) { return load(w[i / V] + (k + d) * kBlock + i % V * Vec::W); });
    });
  }
  for (; k < K; ++k)
    sums.add([&](int r) { return x[r * ldx + k]; },
             [&](int i) { return load(w[i / V] + k * kBlock + i % V * Vec::W); });
  sums.store_to(place);
}

#if DFLASH_BF16_DOT
// Two k of 16 outputs as pairs of bf16, which has every int8: a float's upper half is all of it.
inline __m512i load_pairs(const int8_t* p) {
  const auto half = [&](int h) { return _mm512_castps_si512(load(p + h * kBlock).v); };
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(half(0), 16), half(1));
}
#endif

#if DFLASH_VEC == 256
alignas(32) constexpr uint32_t kUpperHalves[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                  0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
#endif

#if !DFLASH_BF16_DOT
// The first (H = 0) or the second k of W pairs of bf16.
template <int H>
inline Vec load_half(const bf16* p) {
#if DFLASH_VEC == 512
  const __m512i u = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(H ? _mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000))) : _mm512_slli_epi32(u, 16))};
#elif DFLASH_VEC == 256
  if constexpr (H == 0) return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16))};
  // Loaded again, and the mask with it: the sums leave no register to keep either in.
  Vec upper;
  asm("vmovdqu %1, %0\n\tvpand %2, %0, %0" : "=&x"(upper.v) : "m"(*(const __m256i_u*)p), "m"(kUpperHalves));
  return upper;
#else
  return each([&](int i) { return to_float(p[2 * i + H]); });
#endif
}

template <int R, int S>
DFLASH_NOINLINE void micro_pairs(const float* x, int64_t ldx, const bf16* const* w, int64_t K, Ahead ahead,
                                 Place place) {
  constexpr int V = kBlockVectors;
  Sums<R, S * V> sums(place);
  for (int64_t k = 0; k < K; k += 2) {
    ahead.ask_each<S>(w);
    times<2>([&](auto h) {
      sums.add([&](int r) { return x[r * ldx + k + h]; },
               [&](int i) { return load_half<h>(w[i / V] + k * kBlock + i % V * 2 * Vec::W); });
    });
  }
  sums.store_to(place);
}
#elif !defined(__AMX_BF16__)
inline __m512i load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }

// Two k of a row in every lane. Clang would choose vbroadcastss, with which the loop over int8 takes a third more time
// on Zen 4.
inline DFLASH_INLINE __m512bh every_lane(const bf16* x) {
#if defined(__clang__)
  struct __attribute__((packed, may_alias)) Two { int32_t bits; };
  __m512i two;
  asm("vpbroadcastd %1, %0" : "=v"(two) : "m"(*reinterpret_cast<const Two*>(x)));
  return (__m512bh)two;
#else
  int32_t two;
  std::memcpy(&two, x, 4);
  return (__m512bh)_mm512_set1_epi32(two);
#endif
}

// One vdpbf16ps per row, block and pair of k; x stays bf16.
template <int R, int S, class Weight>
DFLASH_NOINLINE void micro_dot(const bf16* x, int64_t ldx, const Weight* const* w, int64_t K, Ahead ahead,
                               Place place) {
  Sums<R, S> sums(place);
  for (int64_t k = 0; k < K; k += 2) {
    if (kLineDepth<Weight> == 2 || k % kLineDepth<Weight> == 0) ahead.ask_each<S>(w);
    __m512bh b[S];
    times<S>([&](auto s) { b[s] = (__m512bh)load_pairs(w[s] + k * kBlock); });
    times<R>([&](auto r) {
      const __m512bh a = every_lane(x + r * ldx + k);
      times<S>([&](auto s) { sums.v[r * S + s].v = _mm512_dpbf16_ps(sums.v[r * S + s].v, a, b[s]); });
    });
  }
  sums.store_to(place);
}
#endif

}  // namespace
}  // namespace dflash::DFLASH_ISA
