#pragma once

#include "cpu/isa.h"
#include "cpu/rope_head.h"
#include "cpu/types.h"

namespace dflash {

// Norm and rotation in place on the q and k heads of rows [q | k | v]; with a cache also K and V to their slots.
struct QkNormRopeParams {
  Rows qkv;
  const int64_t* positions;
  const void* q_weight;  // nullptr: no norm
  const void* k_weight;
  void* k_cache;         // nullptr: nothing is stored
  void* v_cache;
  CacheScale k_scale, v_scale;
  const int64_t* slots;
  RotaryTable table;
  CacheView cache;
  int64_t tokens, num_heads, num_kv_heads, head_dim;
  float eps;
  Dtype dtype;
};

}  // namespace dflash

DFLASH_DECLARE_KERNEL(qk_norm_rope, QkNormRopeParams)
