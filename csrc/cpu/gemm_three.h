// The loop of gemm_micro.h for three rows of x and two blocks of bf16 with 256 bits, written out: twelve sums, three
// elements of x and a vector of weights are all of the 16 registers, and the compiler would keep some of the sums on
// the stack, which takes a third more time.
#pragma once

#include "cpu/gemm_micro.h"

#if DFLASH_VEC == 256

namespace dflash::DFLASH_ISA {
namespace {

alignas(32) constexpr uint32_t kUpperHalves[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                  0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};

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
               : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9),   \
                 "+x"(s10), "+x"(s11)                                                                                  \
               : [x] "r"(x), [ld] "r"(stride), [a] "r"(a), [b] "r"(b), [upper] "m"(kUpperHalves)                       \
               : "xmm12", "xmm13", "xmm14", "xmm15", "memory")

DFLASH_NOINLINE void micro_three(const float* x, int64_t ldx, const bf16* const* w, int64_t K, Ahead ahead,
                                 Place place) {
  Sums<3, 4> sums(place);
  Vec* v = sums.v;
  __m256 s0 = v[0].v, s1 = v[1].v, s2 = v[2].v, s3 = v[3].v, s4 = v[4].v, s5 = v[5].v, s6 = v[6].v, s7 = v[7].v,
         s8 = v[8].v, s9 = v[9].v, s10 = v[10].v, s11 = v[11].v;
  const int64_t stride = ldx * int64_t(sizeof(float));
  const bf16 *a = w[0], *b = w[1];
  for (const bf16* end = a + K * kBlock; a != end; x += 2, a += 2 * kBlock, b += 2 * kBlock) {
    ahead.ask_each<2>(w);
    DFLASH_THREE_ROWS(DFLASH_FIRST_K, "");
    DFLASH_THREE_ROWS(DFLASH_SECOND_K, "4");
  }
  const __m256 all[] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11};
  times<12>([&](auto i) { v[i].v = all[i]; });
  sums.store_to(place);
}

#undef DFLASH_THREE_ROWS
#undef DFLASH_THREE_FMAS
#undef DFLASH_SECOND_K
#undef DFLASH_FIRST_K

}  // namespace
}  // namespace dflash::DFLASH_ISA

#endif
