#include "cpu/quant.h"

#include "cpu/quant_rows.h"
#include "cpu/quant_sums.h"
#include "cpu/quant_widen.h"

// The inner loop. A piece of one row takes eight dot products, a subtraction and one multiply-add, or two with a
// minimum, on 512 bits with VNNI; unpacking codes, 12 operations, is shared by the rows of a group. A core that adds
// and multiplies where it takes dot products reaches 8 / 9 or 8 / 10 of its rate of those. A core with two loads a
// cycle beside two dot products would wait for loads, one of x for each and a few more: from five rows on, but for
// q6_k, two blocks share those of x.
//
// Integer sums are in registers. Float sums are too for few rows, and else in the first-level cache: a load and a store
// of one, beside more than ten operations on 512 bits. In registers they would bound rows times blocks. So a thread
// walks all of its blocks side by side, whatever the number of rows: streams that never pause are what the hardware's
// prefetchers follow.

namespace dflash::DFLASH_ISA {
namespace {

// A function in place, whatever the compiler thinks of its size: its arrays are to be registers.
#define DFLASH_HERE __attribute__((always_inline))

// Into the second-level cache, as Ahead::ask; one line after a few dot products, as many requests at once would wait
// for one another and hold up the loads. In place, or the compiler drops a function that only asks.
inline DFLASH_INLINE void ask([[maybe_unused]] const uint8_t* line) {
#if DFLASH_VEC
  _mm_prefetch((const char*)line, _MM_HINT_T1);
#endif
}

// Blocks that share what is loaded of x.
template <Format F> constexpr int kTogether = DFLASH_VNNI && DFLASH_VEC == 512 && kHalves<F> == 1 ? 2 : 1;

// x: the first of the group's rows, of ldx in a piece. c: its sums of the first block, ldc before those of the next. S:
// blocks whose sums are in registers; 0: `blocks` of them, in memory.
template <Format F, int R, int S>
DFLASH_NOINLINE void micro_quant(const RowPiece* x, int64_t ldx, const uint8_t* const* w, int blocks, int64_t begin,
                                 int64_t end, Ahead ahead, float* c, int64_t ldc) {
  constexpr int V = kBlockVectors, H = kHalves<F>, N = kPieceRegisters / H, lines = ceil_lines(layout_of(F).piece);
  const auto at_sum = [&](int s, int r, int v) { return c + s * ldc + r * kBlock + v * Vec::W; };
  Vec held[S ? S * V * R : 1];
  times<S * V * R>([&](auto i) DFLASH_HERE { held[i] = load(at_sum(i / (V * R), i / V % R, i % V)); });
  x += begin * ldx;
  for (int64_t b = begin; b < end; ++b, x += ldx) {
    // Of `together` blocks from s on. update(block, r, v, f): f of that sum is its next value.
    const auto piece = [&](auto together, int s, auto update) DFLASH_HERE {
      constexpr int P = together;
      const uint8_t *record[P], *head[P], *next[P];
      times<P>([&](auto p) DFLASH_HERE {
        record[p] = record_of<F>(w[s + p], b), head[p] = head_of<F>(w[s + p], b), next[p] = w[s + p] + ahead.at;
      });
      times<V>([&](auto v) DFLASH_HERE {
        asm volatile("" : "+r"(x));  // x is loaded for each vector: kept for the next one, it would fill the registers
        IntSums<F, R> ints[P][H];
        times<kPieceRegisters>([&](auto i) DFLASH_HERE {
          constexpr int half = i / N, at = v * kPieceRegisters + i, of = V * kPieceRegisters;
          if constexpr (i % N == 0)
            times<R>([&](auto r) DFLASH_HERE {
              times<P>([&](auto p) DFLASH_HERE { ints[p][half].start(r, x[r].init[half]); });
            });
          times<(at + 1) * lines / of - at * lines / of>([&](auto) DFLASH_HERE {
            times<P>([&](auto p) DFLASH_HERE {
              ask(next[p]);
              next[p] += ahead.step;
            });
          });
          Codes codes[P];
          times<P>([&](auto p) DFLASH_HERE { codes[p] = codes_of<F, i>(record[p], v); });
          times<R>([&](auto r) DFLASH_HERE {
            const int8_t* k = x[r].q + i * 4;
            if constexpr (P == 1) {
              ints[0][half].template add<i % N>(r, codes[0], k);
            } else {
              const Codes k4 = of_four(four(k));
              times<P>([&](auto p) DFLASH_HERE { ints[p][half].template add<i % N>(r, codes[p], k4); });
            }
          });
        });
        times<P>([&](auto p) DFLASH_HERE {
          Vec d[H], m;
          times<H>([&](auto half) DFLASH_HERE { d[half] = scale_of<F>(record[p], head[p], half, v); });
          if constexpr (kHasMinimum<F>) m = minimum_of<F>(record[p], head[p], v);
          times<R>([&](auto r) DFLASH_HERE {
            update(p, r, v, [&](Vec sum) DFLASH_HERE {
              times<H>([&](auto half) DFLASH_HERE {
                sum = fma(d[half], ints[p][half].finish(r) - set1(x[r].base), sum);
              });
              if constexpr (kHasMinimum<F>) sum = fma(m, set1(x[r].sum), sum);
              return sum;
            });
          });
        });
      });
    };
    constexpr std::integral_constant<int, 1> one{};
    times<S>([&](auto s) DFLASH_HERE {
      piece(one, s, [&](auto, auto r, auto v, auto f) DFLASH_HERE {
        held[(s * R + r) * V + v] = f(held[(s * R + r) * V + v]);
      });
    });
    if constexpr (S == 0) {
      constexpr std::integral_constant<int, kTogether<F>> together{};
      int s = 0;
      const auto in_memory = [&](auto p, auto r, auto v, auto f) DFLASH_HERE {
        store(at_sum(s + p, r, v), f(load(at_sum(s + p, r, v))));
      };
      for (; s + together <= blocks; s += together) piece(together, s, in_memory);
      if constexpr (together > 1)
        for (; s < blocks; ++s) piece(one, s, in_memory);
    }
    ahead.at += lines * ahead.step;
  }
  times<S * V * R>([&](auto i) DFLASH_HERE { store(at_sum(i / (V * R), i / V % R, i % V), held[i]); });
}

// Rows in one group: their integer sums fill at most half of 32 registers or of 16. On 512 bits a row has two, of two
// blocks, of q6_k's two scales, or without VNNI of 32 and 16 bits.
constexpr int group_rows(Format format) {
  if (DFLASH_VEC == 512) return 8;
  return DFLASH_VEC ? format == Format::q6_k ? 4 : 8 : 1;
}

// Rows whose float sums fit the other half, for all of a thread's blocks: there a load and a store are not hidden.
constexpr int kFewRows = DFLASH_VEC == 512 ? 4 : DFLASH_VEC ? 1 : 0;

// Several groups take turns over as many pieces, which the second-level cache keeps meanwhile.
constexpr int64_t kChunk = 64;

// How many lines ahead of its loads a thread asks for. Where a line's dot products take less time than reading it, the
// hardware's own prefetchers ask for more at once than a thread can, and do not see what it asks for far ahead.
template <Format F>
inline int64_t ahead_lines(int64_t rows) {
  constexpr int hidden = DFLASH_VEC == 512 && !kSignedCodes ? 3 : 2;  // vectors of dot products
  return rows * kPieceRegisters < hidden * ceil_lines(layout_of(F).piece) ? 32 : 128;
}

template <Format F, int S, int R>
inline void group(const QuantSums& p, int64_t row, int rows, int64_t begin, int64_t end, Ahead ahead) {
  if (rows == R)
    return micro_quant<F, R, S>(p.x + row, p.rows, p.weights, p.blocks, begin, end, ahead, p.c + row * kBlock,
                                p.rows * kBlock);
  if constexpr (R > 1) group<F, S, R - 1>(p, row, rows, begin, end, ahead);
}

template <Format F>
inline void sums_of(const QuantSums& p) {
  constexpr int most = group_rows(F);
  const int64_t groups = ceil_div(p.rows, most), chunk = groups > 1 && p.pieces > kChunk ? kChunk : p.pieces;
  std::memset(p.c, 0, p.blocks * p.rows * kBlock * sizeof(float));
  for (int64_t b = 0; b < p.pieces; b += chunk) {
    const int64_t end = p.pieces - b < chunk ? p.pieces : b + chunk;
    for (int64_t g = 0, r = 0, m; g < groups; ++g, r += m) {
      m = ceil_div(p.rows - r, groups - g);
      const int64_t at = format_bytes(F, b);
      Ahead ahead{at + ahead_lines<F>(p.rows) * kLine / p.blocks, kLine};
      if (groups > 1) ahead = {at + format_bytes(F, chunk) * (groups + g) / groups, ceil_div(kLine, groups)};
      if constexpr (kFewRows > 0)
        if (m <= kFewRows && p.blocks == kStreams) {
          group<F, kStreams, kFewRows>(p, r, int(m), b, end, ahead);
          continue;
        }
      group<F, 0, most>(p, r, int(m), b, end, ahead);
    }
  }
}

// f(format) with the format as a constant.
template <class F>
inline void with_format(Format format, F f) {
  switch (format) {
    case Format::none: return;
    case Format::q4_0: return f(std::integral_constant<Format, Format::q4_0>{});
    case Format::q4_1: return f(std::integral_constant<Format, Format::q4_1>{});
    case Format::q8_0: return f(std::integral_constant<Format, Format::q8_0>{});
    case Format::q4_k: return f(std::integral_constant<Format, Format::q4_k>{});
    case Format::q5_k: return f(std::integral_constant<Format, Format::q5_k>{});
    case Format::q6_k: return f(std::integral_constant<Format, Format::q6_k>{});
  }
}

}  // namespace

void quant_rows(const QuantRows& p) {
  with_type(p.dtype, [&](auto t) { round_rows<decltype(t)>(p); });
}

void quant_sums(const QuantSums& p) {
  with_format(p.format, [&](auto format) { sums_of<decltype(format)::value>(p); });
}

#if !DFLASH_VNNI
void quant_widen(const QuantWiden& p) {
  with_format(p.format, [&](auto format) { widen<decltype(format)::value>(p); });
}

void quant_row(const QuantRow& p) {
  with_format(p.format, [&](auto format) { row<decltype(format)::value>(p); });
}
#endif

}  // namespace dflash::DFLASH_ISA
