#include "cpu/rate.h"

#include "cpu/amx.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

// More independent sums than any core needs to hide the latency of one.
constexpr int kSums = Vec::W == 16 ? 24 : 12;

struct Done {
  float sum;
  int64_t flops;
};

// one vector multiply-add for each sum
Done vector_rounds(int64_t rounds) {
  Vec sums[kSums], a = set1(1.0f), b = set1(0.5f);
  for (Vec& s : sums) s = a;
  for (int64_t i = 0; i < rounds; ++i) {
#if DFLASH_VEC
    asm volatile("" : "+v"(a.v), "+v"(b.v));
#endif
#pragma GCC unroll 24
    for (int s = 0; s < kSums; ++s) sums[s] = fma(a, b, sums[s]);
  }
  Vec sum = sums[0];
  for (int s = 1; s < kSums; ++s) sum = sum + sums[s];
  return {reduce_add(sum), rounds * kSums * Vec::W * 2};
}

#if defined(__AMX_BF16__)
// Four sums, as many as the products have.
Done pair_rounds(int64_t rounds) {
  alignas(64) float sums[16 * 16] = {};
  configure_tiles(16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, sums, 64);
  _tile_loadd(5, sums, 64);
  _tile_loadd(6, sums, 64);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, sums, 64);
  _tile_release();
  return {sums[0], rounds * 4 * 16 * 16 * 32 * 2};
}
#elif defined(__AVX512BF16__)
Done pair_rounds(int64_t rounds) {
  __m512 sums[kSums];
  __m512i a = _mm512_set1_epi32(0x3f803f80), b = a;
  for (__m512& s : sums) s = _mm512_setzero_ps();
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 24
    for (int s = 0; s < kSums; ++s) sums[s] = _mm512_dpbf16_ps(sums[s], (__m512bh)a, (__m512bh)b);
  }
  for (int s = 1; s < kSums; ++s) sums[0] = _mm512_add_ps(sums[0], sums[s]);
  return {reduce_add({sums[0]}), rounds * kSums * 16 * 4};
}
#else
Done pair_rounds(int64_t rounds) { return vector_rounds(rounds); }
#endif

// Products of bytes, four to a sum of 32 bits, or without an instruction for it two to a sum of 16 bits.
#if DFLASH_VEC
#if DFLASH_VEC == 512
using Bytes = __m512i;
inline Bytes all_bytes(char x) { return _mm512_set1_epi8(x); }
inline Bytes both(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
#if defined(__AVX512VNNI__)
inline Bytes add_products(Bytes sum, Bytes a, Bytes b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // the compiler copies the intrinsic's sums about
  return sum;
}
#else
inline Bytes add_products(Bytes sum, Bytes a, Bytes b) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b)); }
#endif
#else
using Bytes = __m256i;
inline Bytes all_bytes(char x) { return _mm256_set1_epi8(x); }
inline Bytes both(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
#if defined(__AVXVNNI__)
inline Bytes add_products(Bytes sum, Bytes a, Bytes b) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}
#else
inline Bytes add_products(Bytes sum, Bytes a, Bytes b) {
  Bytes product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
  return sum;
}
#endif
#endif
constexpr int kByteSums = DFLASH_VEC == 512 ? 12 : 8;  // with a, b and a product, no more than there are registers
Done byte_rounds(int64_t rounds) {
  Bytes sums[kByteSums], a = all_bytes(1), b = a;
  for (Bytes& s : sums) s = a;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int s = 0; s < kByteSums; ++s) {
      asm volatile("" : "+v"(a), "+v"(b));  // for each sum, or one product would do for all
      sums[s] = add_products(sums[s], a, b);
    }
  }
  Bytes all = sums[0];  // not the sums' own memory, which would keep them there
  for (int s = 1; s < kByteSums; ++s) all = both(all, sums[s]);
  float first;
  std::memcpy(&first, &all, sizeof(first));
  return {first, rounds * kByteSums * int64_t(sizeof(Bytes)) * 2};
}
#else
Done byte_rounds(int64_t rounds) { return vector_rounds(rounds); }
#endif

}  // namespace

void matrix_rate(const MatrixRateParams& p) {
  const int64_t threads = num_threads();
  float sum = 0.0f;
  int64_t flops = 0;
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Done done = p.what == Multiplied::int8   ? byte_rounds(p.rounds)
                        : p.what == Multiplied::bf16 ? pair_rounds(p.rounds)
                                                     : vector_rounds(p.rounds);
      __atomic_fetch_add(&flops, done.flops, __ATOMIC_RELAXED);
      if (t == 0) sum = done.sum;
    }
  });
  *p.flops = flops;
  *p.sum = sum;
}

}  // namespace dflash::DFLASH_ISA
