#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

// Reads `bytes` bytes once, as fast as this instruction set can: the limit that other kernels are measured against.
struct StreamReadParams {
  const void* data;
  int64_t bytes;
  bool far;       // asks for lines into the second-level cache: faster on some machines, slower on others
  uint64_t* sum;  // takes the sum of all 64-bit words, so that the reads are not optimised away
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(stream_read, StreamReadParams)
