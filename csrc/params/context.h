// What the bindings hand to write_context_kv, on a CPU or a GPU.
#pragma once

#include "cpu/types.h"

namespace dflash {

constexpr int64_t kMaxLayers = 64;  // MAX_LAYERS in dflash_kernels/limits.py

// Rows [K_0 | V_0 | K_1 | V_1 | ...]: K normed and rotated, V scaled, each layer's to its own cache.
struct WriteContextKvParams {
  ConstRows kv;
  const int64_t* positions;
  const int64_t* slots;
  int64_t slots_layer_stride;  // 0: the same slots for every layer
  const int32_t* commit_lens;  // nullptr: every row is written
  const void* k_weights;       // (layers, head_dim), nullptr: no norm
  RotaryTable table;
  CacheView cache;
  int64_t tokens, requests, layers, num_kv_heads, head_dim;
  float eps, v_scale;
  Dtype dtype;
  void* k_caches[kMaxLayers];
  void* v_caches[kMaxLayers];
  const float* k_scales[kMaxLayers];  // of fp8 caches; nullptr: 1
  const float* v_scales[kMaxLayers];
  int64_t k_scale_head, v_scale_head;  // from one key head's scale to the next: 0 or 1
};

}  // namespace dflash
