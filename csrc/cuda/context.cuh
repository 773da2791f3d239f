// write_context_kv: K and V of every written row are read once and written once. A group of lanes of one warp has one
// head of one token and layer, K and V together, so that all its loads are in flight at the same time.
//
// The steps of a group are written once, over a Group that runs them for all lanes: the kernel's is one lane of a warp,
// the tests' is a loop on the host.
#pragma once

#include <cmath>

#include "cuda/chunk.cuh"
#include "params/context.h"

namespace dflash::cuda {

// How a head is spread over lanes, in chunks of N: chunk i has elements [i * N, (i + 1) * N) of four parts, a and b,
// the firsts and seconds of the pairs that rotate, c and d, the halves of the tail that does not. The parts are `width`
// wide and one sum of squares goes over them, as in the Triton kernels, whose bits these are.
struct ContextShape {
  int width, lanes, rounds;  // with more chunks than lanes, each lane has one in each round
  bool words;                // 16-byte accesses, one round
  bool tail;
  int64_t block;  // rows of a request
};

inline int64_t next_power_of_2(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

inline bool context_in_words(const WriteContextKvParams& p, int64_t itemsize) {
  const int64_t n = 16 / itemsize;  // elements of a word of kv; those of an fp8 cache are a shorter word
  const CacheView& c = p.cache;
  // The stride of a dimension of one element is nobody's business.
  auto divides = [&](int64_t size, int64_t stride) { return size == 1 || stride % n == 0; };
  auto aligned = [](const void* address, int64_t to = 16) { return reinterpret_cast<uintptr_t>(address) % to == 0; };
  const int64_t cached = c.is_fp8 ? n : 16;
  bool all = divides(p.tokens, p.kv.stride) && divides(c.num_pages, c.k_page) && divides(c.num_pages, c.v_page) &&
             divides(c.page_size, c.k_row) && divides(c.page_size, c.v_row) && divides(p.num_kv_heads, c.k_head) &&
             divides(p.num_kv_heads, c.v_head) && aligned(p.kv.data) && aligned(p.k_weights) &&
             aligned(p.table.cos_sin);
  for (int64_t layer = 0; layer < p.layers; ++layer)
    all = all && aligned(p.k_caches[layer], cached) && aligned(p.v_caches[layer], cached);
  return all;
}

inline ContextShape context_shape(const WriteContextKvParams& p) {
  const int64_t itemsize = p.dtype == Dtype::f32 ? 4 : 2, n = 16 / itemsize;
  const int64_t half = p.table.rotary_dim / 2, tail = p.head_dim - 2 * half;
  const int64_t width = next_power_of_2(half > (tail + 1) / 2 ? half : (tail + 1) / 2);
  const bool words = half % n == 0 && tail % n == 0 && width % n == 0 && width <= 32 * n &&
                     context_in_words(p, itemsize);
  const int64_t chunks = words ? width / n : width;
  return {int(width), int(chunks < 32 ? chunks : 32), int((chunks + 31) / 32), words, tail > 0,
          p.commit_lens && p.requests ? p.tokens / p.requests : 1};
}

// One head of one token and layer: where it is read and written, to a cache of C, and by what an fp8 cache's rows are
// divided. table is its row of cos and sin, nullptr without.
template <class T, class C>
struct Head {
  const T *k, *v, *weight;
  C *k_out, *v_out;
  const float *k_scale, *v_scale;
  const void* table;
};

// False where the row is not to be written: past the request's accepted rows, or no such slot, or no such position.
template <class T, class C>
DFLASH_HD bool find_head(const WriteContextKvParams& p, int64_t block, int64_t token, int64_t layer, int64_t head,
                         Head<T, C>& h) {
  if (p.commit_lens && token % block >= p.commit_lens[token / block]) return false;
  const int64_t slot = p.slots[layer * p.slots_layer_stride + token];
  const CacheView& c = p.cache;
  if (slot < 0 || slot >= c.num_pages * c.page_size) return false;
  h.table = nullptr;
  if (p.table.cos_sin) {
    const int64_t position = p.positions[token];
    if (position < 0 || position >= p.table.max_pos) return false;
    h.table = static_cast<const char*>(p.table.cos_sin) +
              position * p.table.rotary_dim * int64_t(p.table.is_float ? sizeof(float) : sizeof(T));
  }
  const int64_t page = slot / c.page_size, row = slot % c.page_size;
  h.k = static_cast<const T*>(p.kv.data) + token * p.kv.stride + (2 * layer * p.num_kv_heads + head) * p.head_dim;
  h.v = h.k + p.num_kv_heads * p.head_dim;
  h.weight = p.k_weights ? static_cast<const T*>(p.k_weights) + layer * p.head_dim : nullptr;
  h.k_out = static_cast<C*>(p.k_caches[layer]) + page * c.k_page + row * c.k_row + head * c.k_head;
  h.v_out = static_cast<C*>(p.v_caches[layer]) + page * c.v_page + row * c.v_row + head * c.v_head;
  h.k_scale = p.k_scales[layer] ? p.k_scales[layer] + head * p.k_scale_head : nullptr;
  h.v_scale = p.v_scales[layer] ? p.v_scales[layer] + head * p.v_scale_head : nullptr;
  return true;
}

template <class T, int N>
DFLASH_HD void table_values(const WriteContextKvParams& p, const void* row, int at, float (&x)[N]) {
  if (p.table.is_float) {
    const auto c = load<float, N>(static_cast<const float*>(row) + at);
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) x[i] = c.v[i];
  } else {
    const auto c = load<T, N>(static_cast<const T*>(row) + at);
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) x[i] = wide(c.v[i]);
  }
}

// To a cache of T, whose bits stay what they are.
template <class T, int N>
DFLASH_HD void store_piece(T* to, const Chunk<T, N>& c, const float*) {
  store(to, c);
}

template <class T, int N>
DFLASH_HD void store_piece(uint8_t* to, const Chunk<T, N>& c, const float* scale) {
  Chunk<uint8_t, N> bytes;
  const float divisor = scale ? *scale : 1.0f;
  DFLASH_UNROLL
  for (int i = 0; i < N; ++i) bytes.v[i] = to_fp8(scale ? wide(c.v[i]) / divisor : wide(c.v[i]));
  store(to, bytes);
}

// What one lane holds of a head: a chunk of a, b, c and d. Without kTail there is no c and no d. C: a cache's elements.
template <class T, class C, int N, bool kTail>
struct Lane {
  int at[4], pair_at;  // offsets in the head of the four pieces, and of the pairs in a row of the table
  bool has[4], interleaved;
  float x[4][N];
  Chunk<T, N> v[4];
  float squares, kept;  // sum of this chunk, then of all lanes; of all lanes in the round that has this lane's number

  static constexpr int kParts = kTail ? 4 : 2;

  DFLASH_HD void place(const WriteContextKvParams& p, const ContextShape& shape, int chunk) {
    const int half = int(p.table.rotary_dim) / 2;
    interleaved = p.table.interleaved;
    pair_at = chunk * N;
    at[0] = interleaved ? 2 * pair_at : pair_at;
    at[1] = interleaved ? at[0] + N : half + pair_at;
    has[0] = has[1] = pair_at < half;
    if constexpr (kTail) {
      at[2] = 2 * half + pair_at;
      at[3] = at[2] + shape.width;
      has[2] = at[2] < p.head_dim;
      has[3] = at[3] < p.head_dim;
    }
  }

  // What this lane has of a row of heads' width.
  DFLASH_HD void read_row(const T* from, float (&to)[4][N]) const {
    if (has[0]) {
      const auto first = load<T, N>(from + at[0]), second = load<T, N>(from + at[1]);
      DFLASH_UNROLL
      for (int i = 0; i < N; ++i) {
        const T even = 2 * i < N ? first.v[2 * i % N] : second.v[2 * i % N];
        const T odd = 2 * i + 1 < N ? first.v[(2 * i + 1) % N] : second.v[(2 * i + 1) % N];
        to[0][i] = wide(interleaved ? even : first.v[i]);
        to[1][i] = wide(interleaved ? odd : second.v[i]);
      }
    }
    DFLASH_UNROLL
    for (int part = 2; part < kParts; ++part) {
      if (!has[part]) continue;
      const auto c = load<T, N>(from + at[part]);
      DFLASH_UNROLL
      for (int i = 0; i < N; ++i) to[part][i] = wide(c.v[i]);
    }
  }

  DFLASH_HD void read(const Head<T, C>& h) {
    read_row(h.k, x);
    DFLASH_UNROLL
    for (int part = 0; part < kParts; ++part)
      if (has[part]) v[part] = load<T, N>(h.v + at[part]);
  }

  DFLASH_HD void square() {
    float sum[N];
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) {
      sum[i] = has[0] ? x[0][i] * x[0][i] + x[1][i] * x[1][i] : 0.0f;
      if constexpr (kTail)
        sum[i] += (has[2] ? x[2][i] * x[2][i] : 0.0f) + (has[3] ? x[3][i] * x[3][i] : 0.0f);
    }
    squares = tree_sum(sum);
  }

  DFLASH_HD void keep(int round, int lane) {
    if (round == 0) kept = 0.0f;
    if (round == lane) kept = squares;
  }

  DFLASH_HD void norm(const WriteContextKvParams& p, const T* weight) {
    const float scale = 1.0f / sqrtf(squares / float(p.head_dim) + p.eps);
    float w[4][N];
    read_row(weight, w);
    DFLASH_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (!has[part]) continue;
      DFLASH_UNROLL
      for (int i = 0; i < N; ++i) {
        x[part][i] = x[part][i] * scale * w[part][i];
        if (p.table.round_each) x[part][i] = wide(narrow<T>(x[part][i]));
      }
    }
  }

  DFLASH_HD void rotate(const WriteContextKvParams& p, const void* row) {
    float cos[N], sin[N];
    table_values<T>(p, row, pair_at, cos);
    table_values<T>(p, row, int(p.table.rotary_dim) / 2 + pair_at, sin);
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) {
      const float a = x[0][i], b = x[1][i];
      x[0][i] = a * cos[i] - b * sin[i];
      x[1][i] = b * cos[i] + a * sin[i];
    }
  }

  DFLASH_HD void write(const WriteContextKvParams& p, const Head<T, C>& h) const {
    Chunk<T, N> k[4];
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) {
      const int low = i / 2, high = (N + i) / 2;
      k[0].v[i] = narrow<T>(interleaved ? (i % 2 ? x[1][low] : x[0][low]) : x[0][i]);
      k[1].v[i] = narrow<T>(interleaved ? ((N + i) % 2 ? x[1][high] : x[0][high]) : x[1][i]);
      DFLASH_UNROLL
      for (int part = 2; part < kParts; ++part) k[part].v[i] = narrow<T>(x[part][i]);
    }
    DFLASH_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (!has[part]) continue;
      store_piece(h.k_out + at[part], k[part], h.k_scale);
      Chunk<T, N> out = v[part];
      if (p.v_scale != 1.0f) {  // at 1 the bits stay, whatever they are
        DFLASH_UNROLL
        for (int i = 0; i < N; ++i) out.v[i] = narrow<T>(wide(out.v[i]) * p.v_scale);
      }
      store_piece(h.v_out + at[part], out, h.v_scale);
    }
  }
};

// Group has the lanes: each(f) runs f(lane, its number) for all of them, add(of) leaves the sum of of(lane) in each.
template <class L, int N, class T, class C, class Group>
DFLASH_HD void write_head(const WriteContextKvParams& p, const Head<T, C>& h, const ContextShape& shape, Group& group) {
  const auto squares = [](L& l) -> float& { return l.squares; };
  if constexpr (N > 1) {  // one round, which stays in registers
    group.each([&](L& l, int i) {
      l.place(p, shape, i);
      l.read(h);
      l.square();
    });
    if (h.weight) group.add(squares);
  } else if (h.weight) {
    for (int round = 0; round < shape.rounds; ++round) {
      group.each([&](L& l, int i) {
        l.place(p, shape, round * shape.lanes + i);
        l.read(h);
        l.square();
      });
      group.add(squares);
      group.each([&](L& l, int i) { l.keep(round, i); });
    }
    // Neighbouring rounds are added as neighbouring lanes are.
    group.each([](L& l, int) { l.squares = l.kept; });
    group.add(squares);
  }
  for (int round = 0; round < shape.rounds; ++round) {
    group.each([&](L& l, int i) {
      if constexpr (N == 1) {
        l.place(p, shape, round * shape.lanes + i);
        l.read(h);
      }
      if (h.weight) l.norm(p, h.weight);
      if (h.table && l.has[0]) l.rotate(p, h.table);
      l.write(p, h);
    });
  }
}

}  // namespace dflash::cuda
