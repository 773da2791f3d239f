// Views of rotary tables and paged caches as the kernels see them.
#pragma once

#include "bindings/host.h"
#include "cpu/rope_head.h"

namespace dflash {

inline RotaryTable rotary_table(const std::optional<Tensor>& t, bool interleaved, bool round_each) {
  if (!t) return {nullptr, 0, 0, true, interleaved, round_each};
  return {t->data_ptr(), t->size(0), t->size(1), dtype_of(*t, "cos_sin") == Dtype::f32, interleaved, round_each};
}

inline bool is_fp8(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Float8_e4m3fn; }

inline CacheView cache_view(const Tensor& k, const Tensor& v) {
  return {k.size(0),   k.size(1),   k.stride(0), k.stride(1), k.stride(2),
          v.stride(0), v.stride(1), v.stride(2), is_fp8(k)};
}

inline CacheScale cache_scale(const std::optional<Tensor>& t) {
  return {data<const float>(t), t && t->numel() > 1 ? 1 : 0};
}

}  // namespace dflash
