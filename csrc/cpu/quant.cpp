#include "cpu/quant.h"

#include "cpu/quant_rows.h"
#include "cpu/quant_sums.h"
#include "cpu/quant_widen.h"

// The inner loops. A piece of one row takes eight dot products, a subtraction and one multiply-add, or two with a
// minimum, on 512 bits with VNNI; unpacking codes, 16 operations, is shared by the rows of a group. A core with one
// unit for both reaches 8 / 9 or 8 / 10 of its rate of dot products.

namespace dflash::DFLASH_ISA {
namespace {

// A function in place, whatever the compiler thinks of its size: its arrays are to be registers.
#define DFLASH_HERE __attribute__((always_inline))

// x: the first of the group's rows, of ldx in a piece.
template <Format F, int R, int S>
DFLASH_NOINLINE void micro_quant(const RowPiece* x, int64_t ldx, const uint8_t* const* w, int64_t begin, int64_t end,
                                 Ahead ahead, float* c, int64_t ldc) {
  constexpr int V = kBlockVectors, H = kHalves<F>, N = kPieceRegisters / H;
  Sums<R, S * V> sums(c, ldc);
  x += begin * ldx;
  for (int64_t b = begin; b < end; ++b, x += ldx) {
    times<ceil_lines(layout_of(F).piece)>([&](auto) DFLASH_HERE { ahead.template ask<S>(w); });
    times<S>([&](auto s) DFLASH_HERE {
      const uint8_t *record = record_of<F>(w[s], b), *head = head_of<F>(w[s], b);
      times<V>([&](auto v) DFLASH_HERE {
        asm volatile("" : "+r"(x));  // x is loaded for each vector: kept for the next one, it would fill the registers
        times<H>([&](auto half) DFLASH_HERE {
          IntSums<F, R> ints;
          times<R>([&](auto r) DFLASH_HERE { ints.start(r, x[r].init[half]); });
          times<N>([&](auto i) DFLASH_HERE {
            const Codes codes = codes_of<F, half * N + i>(record, v);
            times<R>([&](auto r) DFLASH_HERE { ints.template add<i>(r, codes, x[r].q + (half * N + i) * 4); });
          });
          const Vec d = scale_of<F>(record, head, half, v);
          times<R>([&](auto r) DFLASH_HERE {
            Vec& sum = sums.v[(r * S + s) * V + v];
            sum = fma(d, ints.finish(r) - set1(x[r].base), sum);
          });
        });
        if constexpr (kHasMinimum<F>) {
          const Vec m = minimum_of<F>(record, head, v);
          times<R>([&](auto r) DFLASH_HERE {
            Vec& sum = sums.v[(r * S + s) * V + v];
            sum = fma(m, set1(x[r].sum), sum);
          });
        }
      });
    });
  }
  sums.store_to(c, ldc);
}

// Several groups take turns over as many pieces, which the second-level cache keeps meanwhile.
constexpr int64_t kChunk = 64;

// As in gemm_rows.h: how many lines ahead of its loads a thread asks for.
inline int64_t ahead_lines(int64_t rows) { return rows > 1 ? 128 : 32; }

// Rows in one group beside S blocks, of 32 registers or 16. Without VNNI a row takes one more, unless its products do
// not wait to be folded. One block alone is what is left over of a thread's.
constexpr int rows_beside(Format format, int blocks) {
  if (DFLASH_VEC == 512) return blocks == 2 && (!kSignedCodes || format == Format::q8_0) ? 8 : 4;
  return DFLASH_VEC ? 4 / blocks : 1 / blocks;
}

template <Format F, int S, int R>
inline void group(const QuantSums& p, int64_t row, int rows, int64_t begin, int64_t end, Ahead ahead) {
  if (rows == R)
    return micro_quant<F, R, S>(p.x + row, p.rows, p.weights, begin, end, ahead,
                                p.c + row * p.ldc, p.ldc);
  if constexpr (R > 1) group<F, S, R - 1>(p, row, rows, begin, end, ahead);
}

template <Format F, int S>
inline void row_groups(const QuantSums& p) {
  constexpr int most = rows_beside(F, S);
  const int64_t groups = ceil_div(p.rows, most), chunk = groups > 1 && p.pieces > kChunk ? kChunk : p.pieces;
  for (int64_t r = 0; r < p.rows; ++r) std::memset(p.c + r * p.ldc, 0, S * kBlock * sizeof(float));
  for (int64_t b = 0; b < p.pieces; b += chunk) {
    const int64_t end = p.pieces - b < chunk ? p.pieces : b + chunk;
    for (int64_t g = 0, r = 0, m; g < groups; ++g, r += m) {
      m = ceil_div(p.rows - r, groups - g);
      const int64_t at = format_bytes(F, b);
      Ahead ahead{at + ahead_lines(p.rows) * kLine / S, kLine};
      if (groups > 1) ahead = {at + format_bytes(F, chunk) * (groups + g) / groups, ceil_div(kLine, groups)};
      group<F, S, most>(p, r, int(m), b, end, ahead);
    }
  }
}

template <Format F>
void sums_of(const QuantSums& p) {
  if constexpr (rows_beside(F, 4) > 0)
    if (p.blocks == 4 && p.rows <= rows_beside(F, 4)) return row_groups<F, 4>(p);
  if constexpr (rows_beside(F, 2) > 0) {
    if (p.blocks == 4) {
      QuantSums half = p;
      half.blocks = 2;
      sums_of<F>(half);
      half.weights += 2;
      half.c += 2 * kBlock;
      return sums_of<F>(half);
    }
    if (p.blocks == 2 && (DFLASH_VEC == 512 || p.rows <= rows_beside(F, 2))) return row_groups<F, 2>(p);
  }
  for (int s = 0; s < p.blocks; ++s) {
    QuantSums one = p;
    one.blocks = 1;
    one.weights += s;
    one.c += s * kBlock;
    row_groups<F, 1>(one);
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

void quant_widen(const QuantWiden& p) {
  with_format(p.format, [&](auto format) { widen<decltype(format)::value>(p); });
}

void quant_row(const QuantRow& p) {
  with_format(p.format, [&](auto format) { row<decltype(format)::value>(p); });
}

}  // namespace dflash::DFLASH_ISA
