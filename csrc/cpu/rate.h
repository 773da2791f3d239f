#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace dflash {

enum class Multiplied : int32_t { f32, bf16, int8 };

// Multiplies and adds in registers alone, on every thread, as the products of this instruction set do: the rate that
// they are measured against.
struct MatrixRateParams {
  Multiplied what;  // decides the instruction
  int64_t rounds;   // of each thread
  int64_t* flops;   // takes the operations done
  float* sum;       // takes a sum of the results, so that the work is not optimised away
};

}  // namespace dflash

DFLASH_DECLARE_RATE_KERNEL(matrix_rate, MatrixRateParams)
