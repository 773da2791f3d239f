// write_context_kv: K and V of every written row are read once and written once. A group of lanes of one warp has one
// head of one token and layer, K and V together, so that its (up to six) loads are in flight at the same time.
//
// The steps of a group are written once, over a Group that runs them for all lanes: the kernel's is one lane of a warp,
// the tests' is a loop on the host.
#pragma once

#include <cmath>

#include "cuda/chunk.cuh"
#include "params/context.h"

namespace dflash::cuda {

// How a head is spread over lanes: lane i has the pairs [i * N, (i + 1) * N) that rotate together and as many elements
// of the tail that does not rotate; with more chunks than lanes, in rounds.
struct ContextShape {
  int lanes, rounds;
  bool words;     // 16-byte accesses, one round
  int64_t block;  // rows of a request
};

inline int64_t next_power_of_2(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

inline bool context_in_words(const WriteContextKvParams& p, int64_t itemsize) {
  const int64_t n = 16 / itemsize, half = p.table.rotary_dim / 2, tail = p.head_dim - 2 * half;
  const CacheView& c = p.cache;
  // The stride of a dimension of one element is nobody's business.
  auto divides = [&](int64_t size, int64_t stride) { return size == 1 || stride % n == 0; };
  auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  bool all = half % n == 0 && tail % n == 0 && next_power_of_2(half > tail ? half : tail) <= 32 * n &&
             divides(p.tokens, p.kv.stride) && divides(c.num_pages, c.k_page) && divides(c.num_pages, c.v_page) &&
             divides(c.page_size, c.k_row) && divides(c.page_size, c.v_row) && divides(p.num_kv_heads, c.k_head) &&
             divides(p.num_kv_heads, c.v_head) && aligned(p.kv.data) && aligned(p.k_weights) && aligned(p.table.cos_sin);
  for (int64_t layer = 0; layer < p.layers; ++layer) all = all && aligned(p.k_caches[layer]) && aligned(p.v_caches[layer]);
  return all;
}

inline ContextShape context_shape(const WriteContextKvParams& p) {
  const int64_t itemsize = p.dtype == Dtype::f32 ? 4 : 2, half = p.table.rotary_dim / 2, tail = p.head_dim - 2 * half;
  const bool words = context_in_words(p, itemsize);
  const int64_t chunks = (next_power_of_2(half > tail ? half : tail) * (words ? itemsize : 16) + 15) / 16;
  return {int(chunks < 32 ? chunks : 32), int((chunks + 31) / 32), words,
          p.commit_lens && p.requests ? p.tokens / p.requests : 1};
}

// One head of one token and layer: where it is read and written. table is its row of cos and sin, nullptr without.
template <class T>
struct Head {
  const T *k, *v, *weight;
  T *k_out, *v_out;
  const void* table;
};

// False where the row is not to be written: past the request's accepted rows, or no such slot, or no such position.
template <class T>
DFLASH_HD bool find_head(const WriteContextKvParams& p, int64_t block, int64_t token, int64_t layer, int64_t head,
                         Head<T>& h) {
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
  h.k_out = static_cast<T*>(p.k_caches[layer]) + page * c.k_page + row * c.k_row + head * c.k_head;
  h.v_out = static_cast<T*>(p.v_caches[layer]) + page * c.v_page + row * c.v_row + head * c.v_head;
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

// What one lane holds of a head. Pairs are (a, b): halves, or neighbours where they are interleaved.
template <class T, int N>
struct Lane {
  int first_at, second_at, tail_at, pair_at;  // offsets in the head, and in the row of the table
  bool has_pair, has_tail, interleaved;
  float a[N], b[N], tail[N];
  Chunk<T, N> v_first, v_second, v_tail;
  float pair_squares, tail_squares;  // sums of this chunk, then of all lanes
  float pair_kept, tail_kept;        // sums of all lanes in the round that has this lane's number

  DFLASH_HD void place(const WriteContextKvParams& p, int chunk) {
    const int half = int(p.table.rotary_dim) / 2;
    interleaved = p.table.interleaved;
    pair_at = chunk * N;
    has_pair = pair_at < half;
    first_at = interleaved ? 2 * pair_at : pair_at;
    second_at = interleaved ? first_at + N : half + pair_at;
    tail_at = 2 * half + pair_at;
    has_tail = tail_at < p.head_dim;
  }

  DFLASH_HD void read_pair(const T* from, float (&x)[N], float (&y)[N]) const {
    const auto first = load<T, N>(from + first_at), second = load<T, N>(from + second_at);
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) {
      const T even = 2 * i < N ? first.v[2 * i % N] : second.v[2 * i % N];
      const T odd = 2 * i + 1 < N ? first.v[(2 * i + 1) % N] : second.v[(2 * i + 1) % N];
      x[i] = wide(interleaved ? even : first.v[i]);
      y[i] = wide(interleaved ? odd : second.v[i]);
    }
  }

  DFLASH_HD void read_tail(const T* from, float (&x)[N]) const {
    const auto c = load<T, N>(from + tail_at);
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) x[i] = wide(c.v[i]);
  }

  DFLASH_HD void read(const Head<T>& h) {
    if (has_pair) {
      read_pair(h.k, a, b);
      v_first = load<T, N>(h.v + first_at);
      v_second = load<T, N>(h.v + second_at);
    }
    if (has_tail) {
      read_tail(h.k, tail);
      v_tail = load<T, N>(h.v + tail_at);
    }
  }

  DFLASH_HD void square() {
    float x[N], y[N];
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) {
      x[i] = has_pair ? a[i] * a[i] + b[i] * b[i] : 0.0f;
      y[i] = has_tail ? tail[i] * tail[i] : 0.0f;
    }
    pair_squares = tree_sum(x);
    tail_squares = tree_sum(y);
  }

  DFLASH_HD void keep(int round, int lane) {
    if (round == 0) pair_kept = tail_kept = 0.0f;
    if (round == lane) {
      pair_kept = pair_squares;
      tail_kept = tail_squares;
    }
  }

  DFLASH_HD void restore() {
    pair_squares = pair_kept;
    tail_squares = tail_kept;
  }

  DFLASH_HD static void norm(float (&x)[N], const float (&weight)[N], float scale, bool round) {
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) {
      x[i] = x[i] * scale * weight[i];
      if (round) x[i] = wide(narrow<T>(x[i]));
    }
  }

  DFLASH_HD void norm(const WriteContextKvParams& p, const T* weight) {
    const float scale = 1.0f / sqrtf((pair_squares + tail_squares) / float(p.head_dim) + p.eps);
    float x[N], y[N];
    if (has_pair) {
      read_pair(weight, x, y);
      norm(a, x, scale, p.table.round_each);
      norm(b, y, scale, p.table.round_each);
    }
    if (has_tail) {
      read_tail(weight, x);
      norm(tail, x, scale, p.table.round_each);
    }
  }

  DFLASH_HD void rotate(const WriteContextKvParams& p, const void* row) {
    float cos[N], sin[N];
    table_values<T>(p, row, pair_at, cos);
    table_values<T>(p, row, int(p.table.rotary_dim) / 2 + pair_at, sin);
    DFLASH_UNROLL
    for (int i = 0; i < N; ++i) {
      const float x = a[i], y = b[i];
      a[i] = x * cos[i] - y * sin[i];
      b[i] = y * cos[i] + x * sin[i];
    }
  }

  // V at 1 keeps its bits, whatever they are.
  DFLASH_HD static void write_v(T* to, Chunk<T, N> c, float scale) {
    if (scale != 1.0f) {
      DFLASH_UNROLL
      for (int i = 0; i < N; ++i) c.v[i] = narrow<T>(wide(c.v[i]) * scale);
    }
    store(to, c);
  }

  DFLASH_HD void write(const WriteContextKvParams& p, const Head<T>& h) const {
    if (has_pair) {
      Chunk<T, N> first, second;
      DFLASH_UNROLL
      for (int i = 0; i < N; ++i) {
        const int pair = (N + i) / 2;
        first.v[i] = narrow<T>(interleaved ? (i % 2 ? b : a)[i / 2] : a[i]);
        second.v[i] = narrow<T>(interleaved ? ((N + i) % 2 ? b : a)[pair] : b[i]);
      }
      store(h.k_out + first_at, first);
      store(h.k_out + second_at, second);
      write_v(h.v_out + first_at, v_first, p.v_scale);
      write_v(h.v_out + second_at, v_second, p.v_scale);
    }
    if (has_tail) {
      Chunk<T, N> c;
      DFLASH_UNROLL
      for (int i = 0; i < N; ++i) c.v[i] = narrow<T>(tail[i]);
      store(h.k_out + tail_at, c);
      write_v(h.v_out + tail_at, v_tail, p.v_scale);
    }
  }
};

// Group has the lanes: each(f) runs f(lane, its number) for all of them, add(of) leaves the sum of of(lane) in each.
template <class T, int N, class Group>
DFLASH_HD void write_head(const WriteContextKvParams& p, const Head<T>& h, const ContextShape& shape, Group& group) {
  using L = Lane<T, N>;
  const int lanes = shape.lanes;
  if constexpr (N > 1) {  // one round, which stays in registers
    group.each([&](L& l, int i) {
      l.place(p, i);
      l.read(h);
      l.square();
    });
    if (h.weight) {
      group.add([](L& l) -> float& { return l.pair_squares; });
      group.add([](L& l) -> float& { return l.tail_squares; });
    }
  } else if (h.weight) {
    for (int round = 0; round < shape.rounds; ++round) {
      group.each([&](L& l, int i) {
        l.place(p, round * lanes + i);
        l.read(h);
        l.square();
      });
      group.add([](L& l) -> float& { return l.pair_squares; });
      group.add([](L& l) -> float& { return l.tail_squares; });
      group.each([&](L& l, int i) { l.keep(round, i); });
    }
    // Neighbouring rounds are added as neighbouring lanes are.
    group.add([](L& l) -> float& { return l.pair_kept; });
    group.add([](L& l) -> float& { return l.tail_kept; });
    group.each([](L& l, int) { l.restore(); });
  }
  for (int round = 0; round < shape.rounds; ++round) {
    group.each([&](L& l, int i) {
      if constexpr (N == 1) {
        l.place(p, round * lanes + i);
        l.read(h);
      }
      if (h.weight) l.norm(p, h.weight);
      if (h.table && l.has_pair) l.rotate(p, h.table);
      l.write(p, h);
    });
  }
}

}  // namespace dflash::cuda
