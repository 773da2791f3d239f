// The shape of AMX tiles.
#pragma once

#include "cpu/types.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace dflash::DFLASH_ISA {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Eight tiles of 16 rows of 64 bytes, but for 0-4, which have `rows`: accumulators and the operand that they share.
inline void configure_tiles(int rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = t <= 4 ? rows : 16;
  }
  // Not the intrinsic: it does not tell the compiler that all of the record is read.
  asm volatile("ldtilecfg %0" ::"m"(config));
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
#endif
