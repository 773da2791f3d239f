// Plain records shared by bindings and kernels. No torch, no functions: safe under every instruction set's flags.
#pragma once

#include <cstdint>

namespace dflash {

enum class Dtype : int32_t { f32, bf16, f16 };

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// A 2-D row view: `rows` rows of contiguous elements, `stride` elements apart.
struct Rows {
  void* data;
  int64_t stride;
};

struct ConstRows {
  const void* data;
  int64_t stride;
};

}  // namespace dflash
