// Random numbers that depend on what they are for, and on nothing that came before.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace dflash::DFLASH_ISA {
namespace {

enum class Purpose : uint32_t { sample, accept, draft };

// First word of Philox4x32-10 (Salmon et al. 2011) with a 64-bit key and counter (c0, c1, c2, 0).
inline uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32), c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// In (0, 1). `start` is where the block starts, for the purposes that a later block may ask of the same position again.
inline double uniform(int64_t seed, int64_t position, Purpose purpose, int64_t start) {
  const uint32_t from = purpose == Purpose::sample ? 0 : uint32_t(start);
  return (philox(uint64_t(seed), uint32_t(position), uint32_t(purpose), from) + 0.5) / 4294967296.0;
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
