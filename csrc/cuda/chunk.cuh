// Rows in pieces: N neighbouring elements that one lane reads or writes with 16-byte accesses, or one at a time.
// Everything here compiles for the host too, where the tests run it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define DFLASH_HD __host__ __device__ __forceinline__
#define DFLASH_UNROLL _Pragma("unroll")
#else
#define DFLASH_HD inline
#define DFLASH_UNROLL
#endif

namespace dflash::cuda {

template <class T, int N>
struct Chunk {
  T v[N];
};

DFLASH_HD float wide(float x) { return x; }
DFLASH_HD float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
DFLASH_HD float wide(__half x) { return __half2float(x); }

template <class T>
DFLASH_HD T narrow(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// float8_e4m3fn as csrc/cpu/fp8.h has it: to nearest, ties to even, 448 for what is beyond, 0x7f for NaN. Where there
// is no instruction for it, CUDA's own function computes in float64, of which most such chips do little.
DFLASH_HD uint8_t to_fp8(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t magnitude = u & 0x7fffffff, sign = (u >> 24) & 0x80;
  if (magnitude > 0x7f800000) return 0x7f;
  uint32_t a = magnitude < 0x43e00000 ? magnitude : 0x43e00000;
  if (a >= 0x3c800000) return uint8_t(sign | (((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - 960));
  float small;  // added to 2^14 it is rounded to multiples of 2^-9
  std::memcpy(&small, &a, 4);
  small += 16384.0f;
  std::memcpy(&a, &small, 4);
  return uint8_t(sign | (a - 0x46800000));
#endif
}

// Words of 16 bytes need addresses that divide by 16, and the shorter ones of fp8 addresses that divide by their
// length.
template <class T, int N>
DFLASH_HD Chunk<T, N> load(const T* from) {
  Chunk<T, N> c;
  if constexpr (sizeof(c) % 16 == 0) {
    constexpr int kPerWord = 16 / sizeof(T);
    DFLASH_UNROLL
    for (int i = 0; i < N; i += kPerWord) {
      const uint4 word = *reinterpret_cast<const uint4*>(from + i);
      std::memcpy(static_cast<void*>(c.v + i), &word, 16);
    }
  } else {
    static_assert(N == 1);
    c.v[0] = *from;
  }
  return c;
}

template <class T, int N>
DFLASH_HD void store(T* to, const Chunk<T, N>& c) {
  if constexpr (sizeof(c) % 16 == 0) {
    constexpr int kPerWord = 16 / sizeof(T);
    DFLASH_UNROLL
    for (int i = 0; i < N; i += kPerWord) {
      uint4 word;
      std::memcpy(&word, c.v + i, 16);
      *reinterpret_cast<uint4*>(to + i) = word;
    }
  } else if constexpr (sizeof(c) == 8 || sizeof(c) == 4 && N > 1) {
    std::conditional_t<sizeof(c) == 8, uint2, uint32_t> word;
    std::memcpy(&word, c.v, sizeof(c));
    *reinterpret_cast<decltype(word)*>(to) = word;
  } else {
    static_assert(N == 1);
    *to = c.v[0];
  }
}

// Neighbours are added, then neighbours of those, and so on: the order of the Triton kernels, so that a row's sum of
// squares has the same bits whichever of the two wrote it. Overwrites x.
template <int N>
DFLASH_HD float tree_sum(float (&x)[N]) {
  DFLASH_UNROLL
  for (int step = 1; step < N; step *= 2) {
    DFLASH_UNROLL
    for (int i = 0; i < N; i += 2 * step) x[i] += x[i + step];
  }
  return x[0];
}

}  // namespace dflash::cuda
