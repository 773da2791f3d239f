// Plain records shared by bindings and kernels. No torch, no functions: safe under every instruction set's flags.
#pragma once

#include <cstdint>

namespace dflash {

enum class Dtype : int32_t { f32, bf16, f16 };

// How a weight's blocks are stored: as GGUF files do (quant.h). Numbers as in dflash_kernels/formats.py.
enum class Format : int32_t { none, q4_0, q4_1, q8_0, q4_k, q5_k, q6_k, q5_0, q5_1, iq4_nl, iq4_xs };

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct fp8 { uint8_t bits; };  // float8_e4m3fn

// A 2-D row view: `rows` rows of contiguous elements, `stride` elements apart.
struct Rows {
  void* data;
  int64_t stride;
};

struct ConstRows {
  const void* data;
  int64_t stride;
};

struct RotaryTable {
  const void* cos_sin;  // (max_pos, rotary_dim), float32 or the rows' dtype; nullptr: no rotation
  int64_t max_pos, rotary_dim;
  bool is_float;
  bool interleaved;
  bool round_each;  // round between norm and rotation
};

struct CacheView {
  int64_t num_pages, page_size;
  int64_t k_page, k_row, k_head;  // strides in elements
  int64_t v_page, v_row, v_head;
  bool is_fp8;  // else of the rows' dtype
};

// What an fp8 cache was divided by: of key head h, data[h * head]. nullptr: 1.
struct CacheScale {
  const float* data;
  int64_t head;
};

inline const float* scale_of(const CacheScale& s, int64_t h) { return s.data ? s.data + h * s.head : nullptr; }

}  // namespace dflash
