// Elements of packed blocks: 16 outputs as pack_weight lays them out, or one row.
#pragma once

#include "cpu/memory.h"
#include "cpu/quant_codes.h"

namespace dflash::DFLASH_ISA {
namespace {

// f(T{}) for an element's type.
template <class F>
inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
  }
}

// Output j's element k of a record.
template <Format F>
inline float element_of(const uint8_t* record, const uint8_t* head, int j, int k) {
  constexpr FormatLayout l = layout_of(F);
  const int at = j * 4 + k % 4, r = k / 4;
  int q = F == Format::q8_0 ? record[r * kLine + at] : record[r / 2 * kLine + at] >> r % 2 * 4 & 15;
  if (kFiveBits<F>) q |= (record[l.high + at] >> r & 1) << 4;
  if (F == Format::q6_k) q |= (record[l.high + r / 4 * kLine + at] >> r % 4 * 2 & 3) << 4;
  if (kLookedUp<F>) q = kLookup[q];
  const uint8_t* scales = record + l.scales;
  const auto half_at = [](const uint8_t* p, int i) { return to_float(reinterpret_cast<const f16*>(p)[i]); };
  float d = 0, m = 0;
  const auto* small = reinterpret_cast<const int8_t*>(scales) + k / (kPiece / kHalves<F>) * kBlock;
  if (F == Format::q6_k || F == Format::iq4_xs) d = float(small[j]) * half_at(head, j);
  else if (l.head) d = float(scales[j]) * half_at(head, j);
  else d = half_at(scales, j);
  if (kHalfMinimum<F>) m = half_at(scales, kBlock + j);
  else if (kHasMinimum<F>) m = float(scales[kBlock + j]) * half_at(head, kBlock + j);
  return d * float(q - l.offset) + m;
}

// A record as floats, 16 outputs for each k.
template <Format F>
inline void widen_record(const uint8_t* record, const uint8_t* head, float* to) {
  for (int v = 0; v < kBlockVectors; ++v) {
    const Vec m = kHasMinimum<F> ? minimum_of<F>(record, head, v) : set1(0.0f);
    times<kPieceRegisters>([&](auto r) {
      const Codes codes = codes_of<F, r>(record, v);
      const Vec d = scale_of<F>(record, head, r / (kPieceRegisters / kHalves<F>), v);
      times<4>([&](auto i) {
        const Vec y = d * (byte_of<i>(codes) - set1(float(layout_of(F).offset)));
        store(to + (r * 4 + i) * kBlock + v * Vec::W, kHasMinimum<F> ? y + m : y);
      });
    });
  }
}

// Floats of a piece as pack_weight lays elements out.
inline void put(const float* from, bf16* to) {
  for (int k = 0; k < kPiece; k += 2) {
    bf16 even[kBlock], odd[kBlock];
    for (int v = 0; v < kBlock; v += Vec::W) {
      store(even + v, load(from + k * kBlock + v));
      store(odd + v, load(from + (k + 1) * kBlock + v));
    }
    for (int j = 0; j < kBlock; ++j) to[k * kBlock + 2 * j] = even[j], to[k * kBlock + 2 * j + 1] = odd[j];
  }
}
template <class T>
inline void put(const float* from, T* to) {
  for (int i = 0; i < kPiece * kBlock; i += Vec::W) store(to + i, load(from + i));
}

template <Format F>
void widen(const QuantWiden& p) {
  alignas(64) float elements[kPiece * kBlock];
  for (int64_t b = 0; b < p.pieces; ++b) {
    widen_record<F>(record_of<F>(p.weight, b), head_of<F>(p.weight, b), elements);
    with_type(p.dtype, [&](auto t) { put(elements, static_cast<decltype(t)*>(p.to) + b * kPiece * kBlock); });
  }
}

template <Format F>
void row(const QuantRow& p) {
  const uint8_t* weight = p.weight + p.n / kBlock * format_bytes(F, p.pieces);
  float elements[kPiece];
  for (int64_t b = 0; b < p.pieces; ++b) {
    for (int k = 0; k < kPiece; ++k)
      elements[k] = element_of<F>(record_of<F>(weight, b), head_of<F>(weight, b), int(p.n % kBlock), k);
    with_type(p.dtype, [&](auto t) {
      for (int k = 0; k < kPiece; k += Vec::W)
        store(static_cast<decltype(t)*>(p.to) + b * kPiece + k, load(elements + k));
    });
  }
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
