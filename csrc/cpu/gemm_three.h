// The loop of gemm_micro.h for three rows of x and two blocks of bf16 with 256 bits, written out: twelve sums, three
// elements of x and a vector of weights are all of the 16 registers, and the compiler would keep some of the sums on
// the stack, which takes a third more time.
#pragma once

#include "cpu/gemm_micro.h"

#if DFLASH_VEC == 256

namespace dflash::DFLASH_ISA {
namespace {

// The first or the second k of eight pairs of bf16.
#define DFLASH_FIRST_K(at) "vmovdqu " at ", %%ymm15\n\tvpslld $16, %%ymm15, %%ymm15\n\t"
#define DFLASH_SECOND_K(at) "vmovdqu " at ", %%ymm15\n\tvpand %[upper], %%ymm15, %%ymm15\n\t"
// Times an element of each row, to sums i, j, k.
#define DFLASH_THREE_FMAS(i, j, k)                                                                                     \
  "vfmadd231ps %%ymm12, %%ymm15, %" #i "\n\tvfmadd231ps %%ymm13, %%ymm15, %" #j                                        \
  "\n\tvfmadd231ps %%ymm14, %%ymm15, %" #k "\n\t"
// One k. "memory" stands for what it reads, for which there are not operands enough.
#define DFLASH_THREE_ROWS(HALF, k)                                                                                     \
  asm volatile("vbroadcastss " k "(%[x]), %%ymm12\n\tvbroadcastss " k "(%[x],%[ld]), %%ymm13\n\t"                      \
               "vbroadcastss " k "(%[x],%[ld],2), %%ymm14\n\t"                                                         \
               HALF("(%[a])") DFLASH_THREE_FMAS(0, 4, 8) HALF("32(%[a])") DFLASH_THREE_FMAS(1, 5, 9)                   \
               HALF("(%[b])") DFLASH_THREE_FMAS(2, 6, 10) HALF("32(%[b])") DFLASH_THREE_FMAS(3, 7, 11)                 \
               : "+x"(sums.v[0].v), "+x"(sums.v[1].v), "+x"(sums.v[2].v), "+x"(sums.v[3].v),                           \
                 "+x"(sums.v[4].v), "+x"(sums.v[5].v), "+x"(sums.v[6].v), "+x"(sums.v[7].v),                           \
                 "+x"(sums.v[8].v), "+x"(sums.v[9].v), "+x"(sums.v[10].v), "+x"(sums.v[11].v)                          \
               : [x] "r"(x), [ld] "r"(stride), [a] "r"(a), [b] "r"(b), [upper] "m"(kUpperHalves)                       \
               : "xmm12", "xmm13", "xmm14", "xmm15", "memory")

DFLASH_NOINLINE void micro_three(const float* x, int64_t ldx, const bf16* const* w, int64_t K, Ahead ahead,
                                 Place place) {
  Sums<3, 4> sums(place);
  const int64_t stride = ldx * int64_t(sizeof(float));
  const bf16 *a = w[0], *b = w[1];
  for (const bf16* end = a + K * kBlock; a != end; x += 2, a += 2 * kBlock, b += 2 * kBlock) {
    ahead.ask_each<2>(w);
    DFLASH_THREE_ROWS(DFLASH_FIRST_K, "");
    DFLASH_THREE_ROWS(DFLASH_SECOND_K, "4");
  }
  sums.store_to(place);
}

#undef DFLASH_THREE_ROWS
#undef DFLASH_THREE_FMAS
#undef DFLASH_SECOND_K
#undef DFLASH_FIRST_K

}  // namespace
}  // namespace dflash::DFLASH_ISA

#endif
