#include "cpu/quant.h"

#include "cpu/quant_rows.h"
#include "cpu/quant_sums.h"
#include "cpu/quant_widen.h"

// The inner loop. A thread has a block of 16 outputs from each of its streams, two or four, and a panel of rows. A
// group of rows meets some of the blocks at once and walks all pieces of K with them, or a chunk of the pieces. It sums
// integers over one piece, for one or two vectors of outputs, and floats over the pieces before:
//
//     bits        rows x blocks   float sums   integer sums                    registers
//     512, VNNI   4 x 4, 6 x 2    16, 12       8, 12: of two blocks            32
//     512         4 x 4, 8 x 2    16, 16       8, 16: of 32 and 16 bits        32
//     256         1 x 4, 6 x 2    8, 24        2, 12: of both vectors          16
//
// For a row and a vector of outputs a piece takes eight dot products, a subtraction and one multiply-add, or two with a
// minimum. Unpacking the codes, 12 operations, is shared by the rows of a group. A core that multiplies and adds where
// it takes dot products reaches 8 / 9 or 8 / 10 of their rate. One with two loads a cycle beside two dot products would
// wait for x, which each of them loads, if two vectors did not share a load. q6_k has two scales in a piece and so two
// integer sums where others have one, which leaves no room for a second vector.
//
// With 256 bits the float sums of several rows do not fit beside the integers, and the compiler keeps some on the
// stack: a load and a store beside more than ten operations. Smaller groups have room for all and unpack more often.

namespace dflash::DFLASH_ISA {
namespace {

// A function in place, whatever the compiler thinks of its size: its arrays are to be registers.
#define DFLASH_HERE __attribute__((always_inline))

// Blocks of S, and vectors of a block, that share what is loaded of x.
template <Format F, int S>
constexpr int kSharedBlocks = DFLASH_VNNI && DFLASH_VEC == 512 && kHalves<F> == 1 && S > 1 ? 2 : 1;
template <Format F, int R>
constexpr int kSharedVectors = DFLASH_VEC == 256 && kHalves<F> == 1 && (DFLASH_VNNI || R > 1) ? 2 : 1;

// x: the first of the group's rows, of ldx in a piece. c: its sums of the first of S blocks, ldc before those of the
// next; on entry they are of pieces [0, begin), and not read if there are none.
template <Format F, int R, int S>
DFLASH_NOINLINE void micro_quant(const RowPiece* x, int64_t ldx, const uint8_t* const* w, int64_t begin, int64_t end,
                                 Ahead ahead, float* c, int64_t ldc) {
  constexpr int V = kBlockVectors, H = kHalves<F>, N = kPieceRegisters / H, lines = ceil_lines(layout_of(F).piece);
  constexpr int P = kSharedBlocks<F, S>, Q = kSharedVectors<F, R>, U = P * Q;
  static_assert(S % P == 0 && V % Q == 0);
  Vec held[S * V * R];
  const auto at_sum = [&](int i) { return c + i / (V * R) * ldc + i / V % R * kBlock + i % V * Vec::W; };
  times<S * V * R>([&](auto i) DFLASH_HERE { held[i] = begin != 0 ? load(at_sum(i)) : set1(0.0f); });
  x += begin * ldx;
  for (int64_t b = begin; b < end; ++b, x += ldx, ahead.at += lines * ahead.step)
    times<S / P>([&](auto pair) DFLASH_HERE {
      const uint8_t *record[P], *head[P], *next[P];
      times<P>([&](auto p) DFLASH_HERE {
        const uint8_t* block = w[pair * P + p];
        record[p] = record_of<F>(block, b), head[p] = head_of<F>(block, b), next[p] = block + ahead.at;
      });
      times<V / Q>([&](auto q) DFLASH_HERE {
        asm volatile("" : "+r"(x));  // x is loaded again for the next vectors: kept, it would fill the registers
        IntSums<F, R> ints[U][H];
        times<kPieceRegisters>([&](auto i) DFLASH_HERE {
          constexpr int half = i / N, at = q * kPieceRegisters + i, of = V / Q * kPieceRegisters;
          if constexpr (i % N == 0)
            times<R>([&](auto r) DFLASH_HERE {
              times<U>([&](auto u) DFLASH_HERE { ints[u][half].start(r, x[r].init[half]); });
            });
          // One line after a few dot products: many requests at once would wait for one another and hold up the loads.
          times<(at + 1) * lines / of - at * lines / of>([&](auto) DFLASH_HERE {
            times<P>([&](auto p) DFLASH_HERE {
              ask(next[p]);
              next[p] += ahead.step;
            });
          });
          Codes codes[U];
          times<U>([&](auto u) DFLASH_HERE { codes[u] = codes_of<F, i>(record[u / Q], q * Q + u % Q); });
          times<R>([&](auto r) DFLASH_HERE {
            const int8_t* k = x[r].q + i * 4;
            if constexpr (U == 1) {
              ints[0][half].template add<i % N>(r, codes[0], k);
            } else {
              const Codes k4 = of_four(four(k));
              times<U>([&](auto u) DFLASH_HERE { ints[u][half].template add<i % N>(r, codes[u], k4); });
            }
          });
        });
        times<U>([&](auto u) DFLASH_HERE {
          constexpr std::integral_constant<int, u / Q> p{};
          constexpr std::integral_constant<int, q * Q + u % Q> v{};
          Vec d[H], m;
          times<H>([&](auto half) DFLASH_HERE { d[half] = scale_of<F>(record[p], head[p], half, v); });
          if constexpr (kHasMinimum<F>) m = minimum_of<F>(record[p], head[p], v);
          times<R>([&](auto r) DFLASH_HERE {
            Vec& sum = held[((pair * P + p) * R + r) * V + v];
            times<H>([&](auto half) DFLASH_HERE {
              sum = fma(d[half], ints[u][half].finish(r) - set1(x[r].base), sum);
            });
            if constexpr (kHasMinimum<F>) sum = fma(m, set1(x[r].sum), sum);
          });
        });
      });
    });
  times<S * V * R>([&](auto i) DFLASH_HERE { store(at_sum(i), held[i]); });
}

constexpr int kGroupRows = DFLASH_VEC == 512 ? (DFLASH_VNNI ? 6 : 8) : DFLASH_VEC ? 6 : 1;  // the most

// The blocks that so many rows meet at once. Four in plain C++ are only longer code.
constexpr int held_blocks(int rows) { return !DFLASH_VEC ? 2 : rows <= (DFLASH_VEC == 512 ? 4 : 1) ? 4 : 2; }

// Several groups take turns over as many pieces, which the second-level cache keeps meanwhile.
constexpr int64_t kChunk = 64;

// How many lines ahead of its loads a thread asks for. Where a line's dot products take less time than reading it, the
// hardware's own prefetchers ask for more at once than a thread can, and do not see what it asks for far ahead.
template <Format F>
inline int64_t ahead_lines(int64_t rows) {
  constexpr int hidden = DFLASH_VEC == 512 && !kSignedCodes ? 3 : 2;  // vectors of dot products
  return rows * kPieceRegisters < hidden * ceil_lines(layout_of(F).piece) ? 32 : 128;
}

// Rows [row, row + R) against the blocks from `from` on, S at once. lead: bytes that a thread asks for ahead of its
// loads, in all the streams that it walks at once.
template <Format F, int R, int S>
inline void group_by(const QuantSums& p, int64_t row, int from, int64_t begin, int64_t end, Ahead ahead, int64_t lead) {
  for (; from + S <= p.blocks; from += S)
    micro_quant<F, R, S>(p.x + row, p.rows, p.weights + from, begin, end, {ahead.at + lead / S, ahead.step},
                         p.c + (from * p.rows + row) * kBlock, p.rows * kBlock);
  if constexpr (S > 1)
    if (from < p.blocks) group_by<F, R, S / 2>(p, row, from, begin, end, ahead, lead);
}

template <Format F, int R>
inline void group(const QuantSums& p, int64_t row, int rows, int64_t begin, int64_t end, Ahead ahead, int64_t lead) {
  if (rows == R) return group_by<F, R, held_blocks(R)>(p, row, 0, begin, end, ahead, lead);
  if constexpr (R > 1) group<F, R - 1>(p, row, rows, begin, end, ahead, lead);
}

template <Format F>
inline void sums_of(const QuantSums& p) {
  const int64_t groups = ceil_div(p.rows, kGroupRows), chunk = groups > 1 && p.pieces > kChunk ? kChunk : p.pieces;
  for (int64_t b = 0; b < p.pieces; b += chunk) {
    const int64_t end = p.pieces - b < chunk ? p.pieces : b + chunk, at = format_bytes(F, b);
    for (int64_t g = 0, r = 0, m; g < groups; ++g, r += m) {
      m = ceil_div(p.rows - r, groups - g);
      if (groups == 1) {
        group<F, kGroupRows>(p, r, int(m), b, end, {at, kLine}, ahead_lines<F>(p.rows) * kLine);
      } else {
        const Ahead ahead{at + format_bytes(F, chunk) * (groups + g) / groups, ceil_div(kLine, groups)};
        group<F, kGroupRows>(p, r, int(m), b, end, ahead, 0);
      }
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
    case Format::q5_0: return f(std::integral_constant<Format, Format::q5_0>{});
    case Format::q5_1: return f(std::integral_constant<Format, Format::q5_1>{});
    case Format::iq4_nl: return f(std::integral_constant<Format, Format::iq4_nl>{});
    case Format::iq4_xs: return f(std::integral_constant<Format, Format::iq4_xs>{});
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
