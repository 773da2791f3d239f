// Products with weights in blocks of 4 to 8 bits, as GGUF files store them, by integer dot products.
//
//     W[n, k] = d * (q - offset) + m      d, m for each output and piece of 32 k (q6_k: of 16)
//     x[k]    = 2^e * xq[k]               xq int8, e for each row and piece: the smallest that makes |xq| <= 127
//     sum    += d * 2^e (q - offset) . xq + m * 2^e (sum of xq)     for every piece in order, in float32
//
// Packed, 16 outputs lie side by side as in gemm.h, and a piece of them is one record with all of the file's bytes:
// codes first, one line for every four k (two lines of eight k where a nibble is a code), byte 4 * output + k, as an
// integer dot product takes them; then the higher bits, scales and minimums. Superblocks of 256 k begin with their own
// scales. A thread thus reads one stream, of the file's bytes to within 3 %.
//
// A power of two makes the products' scale free: xq . q is added to the bits of the float 1.5 * 2^(23 + e), which then
// is 2^e (1.5 * 2^23 + xq . q), exactly, as xq . q is below 2^22. One subtraction is all of the conversion.
#pragma once

#include "cpu/gemm_params.h"
#include "cpu/isa.h"

namespace dflash {

constexpr int64_t kPiece = 32;          // k with one scale of x
constexpr int64_t kPieceOutputs = 16;   // outputs of a record
constexpr int64_t kSuper = 256;         // k of a superblock

// Functions here are static: each set's object has its own, so that the linker merges none.

// Bytes of a record, of the superblock's head before eight of them, and where the parts of a record begin.
struct FormatLayout {
  int64_t piece, head, high, scales;
  int offset;  // what a code is above its value
};

static constexpr FormatLayout layout_of(Format format) {
  switch (format) {
    case Format::q4_0: return {288, 0, 0, 256, 8};
    case Format::q4_1: return {320, 0, 0, 256, 0};
    case Format::q8_0: return {544, 0, 0, 512, 128};
    case Format::q4_k: return {288, 64, 0, 256, 0};
    case Format::q5_k: return {352, 64, 256, 320, 0};
    case Format::q6_k: return {416, 32, 256, 384, 32};
    case Format::q5_0: return {352, 0, 256, 320, 16};
    case Format::q5_1: return {384, 0, 256, 320, 0};
    case Format::iq4_nl: return {288, 0, 0, 256, 128};
    case Format::iq4_xs: return {272, 32, 0, 256, 128};
    default: return {0, 0, 0, 0, 0};
  }
}

// What the codes of iq4_nl and iq4_xs stand for, and the offset.
alignas(16) static constexpr uint8_t kLookup[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                    129, 141, 153, 166, 181, 197, 217, 241};

static constexpr int64_t ceil_lines(int64_t bytes) { return (bytes + 63) / 64; }

// Bytes of `pieces` records with their superblocks' heads.
static constexpr int64_t format_bytes(Format format, int64_t pieces) {
  const FormatLayout l = layout_of(format);
  return pieces * l.piece + pieces / (kSuper / kPiece) * l.head;
}

// 32 elements of a row of x. init: of the integer sums, for both halves of the piece where a scale has 16 k.
struct alignas(16) RowPiece {
  int8_t q[32];
  int32_t init[2];
  float base;  // what to subtract
  float sum;   // 2^e times the sum of q
};

// Rounds rows of x: row r, piece b at out[b * rows + r]. A piece with an element that is not finite or is above 2^106
// makes its row's sums NaN.
struct QuantRows {
  Dtype dtype;
  ConstRows x;
  int64_t rows, pieces;
  Format format;  // of the weight, whose offset the sums begin with
  RowPiece* out;
};

// c[(s * rows + r) * 16 + j] = the sums of `rows` rows against `blocks` blocks of 16 outputs.
struct QuantSums {
  Format format;
  const RowPiece* x;  // of `rows` rows
  int64_t rows, pieces;
  const uint8_t* const* weights;
  int blocks;
  float* c;
};

// A packed block of 16 outputs as elements of `dtype`, packed as pack_weight does.
struct QuantWiden {
  Format format;
  const uint8_t* weight;
  int64_t pieces;
  Dtype dtype;
  void* to;
};

// Row n of a packed weight as elements of `dtype`.
struct QuantRow {
  Format format;
  const uint8_t* weight;
  int64_t n, pieces;
  Dtype dtype;
  void* to;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(quant_widen, QuantWiden)
DFLASH_DECLARE_KERNEL(quant_row, QuantRow)
DFLASH_DECLARE_BYTE_KERNEL(quant_rows, QuantRows)
DFLASH_DECLARE_BYTE_KERNEL(quant_sums, QuantSums)

#if DFLASH_X86
namespace dflash::avx512_bf16 { using avx512::quant_row, avx512::quant_widen; }
namespace dflash::amx { using avx512::quant_row, avx512::quant_widen; }
#endif
