// Attention in splits of kSplit ABSOLUTE positions. A split is one exact softmax over its visible keys; splits are
// combined in order with the usual rescaling. So a row's arithmetic is fixed by its own position and visible keys, and
// any thread may do any split: with few rows in flight the context is split over threads, and no bit moves.
//
// The keys that a row sees are one interval of positions. Nothing outside it is multiplied by zero: it is skipped, so
// that NaN in a neighbour's key, or in a page that nobody sees, reaches no row.
#include "cpu/attention.h"

#include "cpu/attention_amx.h"
#include "cpu/attention_work.h"

namespace dflash::DFLASH_ISA {
namespace {

// E: what multiply-adds take of a row, see attention_keys.h.
template <class T, class E>
class Attention {
 public:
  explicit Attention(const AttentionParams& params)
      : p(params), D(int(params.head_dim)), stride(padded(params.head_dim)), group(params.heads / params.kv_heads),
        tiles(kHasTiles<T> && params.head_dim % 32 == 0) {}

  void prepare(const Scratch& w) const {
    for (int d = 0; d < D; ++d) {
      static_cast<T*>(w.zeros)[d] = from_float<T>(0.0f);
      static_cast<T*>(w.nans)[d] = from_float<T>(NAN);
    }
    for (int j = 0; j < kSplit; ++j) w.key_scale[j] = p.scale;
  }

  void load_queries(const Task& t, const Scratch& w) const {
    const T* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = static_cast<const T*>(w.zeros);
    for (int r = 0; r < t.count; ++r) {
      const int64_t row = t.row0 + r;
      rows[r] = static_cast<const T*>(p.q) + t.request.b * p.q_stride[0] + row / group * p.q_stride[1] +
                (t.h * group + row % group) * p.q_stride[2];
    }
#if DFLASH_ATTENTION_AMX
    if constexpr (kHasTiles<T>) {
      for (int r = 0; tiles && r < t.count; r += 16) pack_queries(rows + r, D, w.packed_q + r * D);
      if (tiles) return;
    }
#endif
    for (int r = 0; r < t.count; ++r)
      if constexpr (kAtOnce<E> == 2)
        std::memcpy(w.q + r * stride, rows[r], size_t(D) * sizeof(T));
      else
        for (int d = 0; d < D; d += W) store(w.q + r * stride + d, load_n(rows[r] + d, D - d));
  }

  // Softmax over split number `split` alone, for all rows of the task. Rows that see nothing of it get sum 0, max -inf.
  void split(const Task& t, int64_t number, const Scratch& w, const State& out) const {
    const int64_t base = number * kSplit;
    int lo[kRows], hi[kRows], begin = kSplit, end = 0;
    for (int r = 0; r < t.count; ++r) {
      const int64_t i = (t.row0 + r) / group;
      lo[r] = int(clamp(t.request.first(p, i) - base, 0, kSplit));
      hi[r] = int(clamp(t.request.last(p, i) - base, 0, kSplit));
      out.max[r] = -INFINITY;
      out.sum[r] = 0.0f;
      if (lo[r] >= hi[r]) continue;
      begin = lo[r] < begin ? lo[r] : begin;
      end = hi[r] > end ? hi[r] : end;
    }
    if (begin >= end) return;
    const T *keys[kSplit], *values[kSplit];
    find_rows(t, base, begin, end, w, keys, values);
    const ValueScale value_scale = scale_cached(t, base, w);
#if DFLASH_ATTENTION_AMX
    if constexpr (kHasTiles<T>)
      if (tiles) return split_amx(p, t.count, begin, end, lo, hi, keys, values, value_scale, w, out);
#endif
    for (int j = begin; j < end && j < (begin & -kTile) + kTile; ++j) prefetch_row(keys[j], D);
    for (int tile = begin & -kTile; tile < end; tile += kTile) score_tile(t, tile, begin, end, lo, hi, keys, values, w);
    for (int r = 0; r < t.count; ++r) {
      for (int64_t d = 0; d < stride; ++d) out.acc[r * stride + d] = 0.0f;
      if (lo[r] >= hi[r]) continue;
      softmax(w.s + r * kSplit, lo[r], hi[r], value_scale, out.max + r, out.sum + r);
      if constexpr (kAtOnce<E> == 2)
        for (int j = lo[r] & -W; j < hi[r]; j += W) store(w.weights + r * kSplit + j, load(w.s + r * kSplit + j));
    }
    for (int tile = begin & -kTile; tile < end; tile += kTile) weigh_tile(t, tile, lo, hi, values, w, out);
  }

  void start(const Task& t, const State& total) const {
    for (int r = 0; r < t.count; ++r) {
      const int64_t head = t.h * group + (t.row0 + r) % group;
      total.max[r] = -INFINITY;
      if (p.sinks) total.max[r] = p.sink_dtype == Dtype::f32 ? static_cast<const float*>(p.sinks)[head]
                                                             : to_float(static_cast<const T*>(p.sinks)[head]);
      total.sum[r] = total.max[r] == -INFINITY ? 0.0f : 1.0f;
      for (int64_t d = 0; d < stride; ++d) total.acc[r * stride + d] = 0.0f;
    }
  }

  void combine(const Task& t, const State& total, const State& part) const {
    for (int r = 0; r < t.count; ++r) {
      if (part.sum[r] == 0.0f) continue;
      const float m = total.max[r] > part.max[r] ? total.max[r] : part.max[r];
      const Vec a = total.max[r] == -INFINITY ? set1(0.0f) : vexp(set1(total.max[r] - m));
      const Vec b = vexp(set1(part.max[r] - m));
      float* to = total.acc + r * stride;
      for (int64_t d = 0; d < stride; d += W) store(to + d, fma(load(part.acc + r * stride + d), b, load(to + d) * a));
      total.sum[r] = reduce_first(fma(set1(part.sum[r]), b, set1(total.sum[r]) * a));
      total.max[r] = m;
    }
  }

  void finish(const Task& t, const State& total) const {
    for (int r = 0; r < t.count; ++r) {
      const int64_t row = t.row0 + r;
      T* out = static_cast<T*>(p.out) + t.request.b * p.out_stride[0] + row / group * p.out_stride[1] +
               (t.h * group + row % group) * p.out_stride[2];
      const Vec sum = set1(total.sum[r] == 0.0f ? 1.0f : total.sum[r]);
      for (int d = 0; d < D; d += W) store_n(out + d, load(total.acc + r * stride + d) / sum, D - d);
    }
  }

 private:
  static float reduce_first(Vec x) {
    float lane[W];
    store(lane, x);
    return lane[0];
  }

  // Where the K and V rows of positions base + [begin, end) are; the rest of the tiles points at zeros.
  void find_rows(const Task& t, int64_t base, int begin, int end, const Scratch& w, const T** keys,
                 const T** values) const {
    const Request& request = t.request;
    const T *zeros = static_cast<const T*>(w.zeros), *nans = static_cast<const T*>(w.nans);
    for (int j = begin & -kTile; j < begin; ++j) keys[j] = zeros;
    for (int j = end; j < ((end + kTile - 1) & -kTile); ++j) keys[j] = zeros;
    int j = begin;
    while (j < end && base + j < request.context) {
      const int64_t index = (base + j) / p.page_size, row = base + j - index * p.page_size;
      const int64_t page = index < p.max_pages ? p.page_table[request.b * p.page_table_stride + index] : -1;
      const int64_t there = clamp(p.page_size - row, 0, clamp(request.context - base, 0, end) - j);
      if (page < 0 || page >= p.num_pages) {
        for (int i = 0; i < there; ++i) keys[j + i] = values[j + i] = nans;
      } else {
        cached_rows(p.k_cache, p.k_cache_stride, page, row, t.h, there, w.cached_k, j, keys);
        cached_rows(p.v_cache, p.v_cache_stride, page, row, t.h, there, w.cached_v, j, values);
      }
      j += int(there);
    }
    const T* k = static_cast<const T*>(p.k) + request.b * p.k_stride[0] + t.h * p.k_stride[2];
    const T* v = static_cast<const T*>(p.v) + request.b * p.v_stride[0] + t.h * p.v_stride[2];
    for (; j < end; ++j) {
      keys[j] = k + (base + j - request.context) * p.k_stride[1];
      values[j] = v + (base + j - request.context) * p.v_stride[1];
    }
  }

  // Rows of a page where they are, or fp8 ones in the same numbers of T, as rows j on of `split`.
  void cached_rows(const void* cache, const int64_t (&strides)[3], int64_t page, int64_t row, int64_t h, int64_t count,
                   void* split, int j, const T** to) const {
    const int64_t at = page * strides[0] + row * strides[1] + h * strides[2];
    if (!p.fp8_cache) {
      const T* first = static_cast<const T*>(cache) + at;
      for (int64_t i = 0; i < count; ++i) to[j + i] = first + i * strides[1];
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      T* wide = static_cast<T*>(split) + (j + i) * stride;
      widen_row(static_cast<const fp8*>(cache) + at + i * strides[1], wide, D);
      to[j + i] = wide;
    }
  }

  // An fp8 cache's scales belong to the keys of the context alone, which come before the block's.
  ValueScale scale_cached(const Task& t, int64_t base, const Scratch& w) const {
    if (!p.fp8_cache) return {1.0f, 0};
    const float *k = scale_of(p.k_scale, t.h), *v = scale_of(p.v_scale, t.h);
    const int end = int(clamp(t.request.context - base, 0, kSplit));
    for (int j = 0; j < kSplit; ++j) w.key_scale[j] = k && j < end ? p.scale * *k : p.scale;
    return {v ? *v : 1.0f, v ? end : 0};
  }

  void score_tile(const Task& t, int tile, int begin, int end, const int* lo, const int* hi, const T* const* keys,
                  const T* const* values, const Scratch& w) const {
    const int from = begin > tile ? (begin - tile) & -W : 0;
    const int to = end < tile + kTile ? (end - tile + W - 1) & -W : kTile;
    for (int j = from; j < to; j += W) {
      // The next tile's keys and this one's values are asked for while this one's keys are transposed.
      for (int i = tile + j; i < tile + j + W; ++i) {
        if (i + kTile < end) prefetch_row(keys[i + kTile], D);
        if (i >= begin && i < end) prefetch_row(values[i], D);
      }
      load_keys<E>(keys + tile + j, D, w.keys + j);
    }
    for (int r = 0; r < t.count; r += 4) {
      const int n = t.count - r < 4 ? t.count - r : 4;
      bool seen = false;
      for (int i = r; i < r + n; ++i) seen |= lo[i] < tile + kTile && hi[i] > tile;
      if (!seen) continue;
      const E* q = reinterpret_cast<const E*>(w.q + r * stride);
      const float *k = w.keys + from, *scale = w.key_scale + tile + from;
      float* s = w.s + r * kSplit + tile + from;
      const int vectors = (to - from) / W, length = D / kAtOnce<E>;
      switch (n) {
        case 4: scores<4>(q, stride, k, vectors, length, scale, p.softcap, s); break;
        case 3: scores<3>(q, stride, k, vectors, length, scale, p.softcap, s); break;
        case 2: scores<2>(q, stride, k, vectors, length, scale, p.softcap, s); break;
        default: scores<1>(q, stride, k, vectors, length, scale, p.softcap, s);
      }
    }
  }

  void weigh_tile(const Task& t, int tile, const int* lo, const int* hi, const T* const* values, const Scratch& w,
                  const State& out) const {
    constexpr int kOnce = kAtOnce<E>, first = kSplit / kOnce;
    const int from = tile / kOnce, to = (tile + kTile) / kOnce;
    for (int r = 0; r < t.count; r += 4) {
      const int n = t.count - r < 4 ? t.count - r : 4;
      // In elements: what a row sees whole, and what all of them see whole.
      int all_lo = from, all_hi = to, row_lo[4], row_hi[4];
      for (int i = 0; i < n; ++i) {
        row_lo[i] = int(clamp((lo[r + i] + kOnce - 1) / kOnce, from, to));
        row_hi[i] = int(clamp(hi[r + i] / kOnce, from, to));
        all_lo = row_lo[i] > all_lo ? row_lo[i] : all_lo;
        all_hi = row_hi[i] < all_hi ? row_hi[i] : all_hi;
      }
      // Keys that only some of the rows see come before and after those that all see; each row keeps its order.
      if (all_hi <= all_lo) all_lo = all_hi = to;
      const E* weights = weights_of(w, r);
      float* acc = out.acc + r * stride;
      for (int i = 0; i < n; ++i) {
        if (lo[r + i] % kOnce && lo[r + i] < hi[r + i] && lo[r + i] / kOnce >= from && lo[r + i] / kOnce < to)
          weigh_half(lo[r + i], weights + i * first, values, w, acc + i * stride);
        weigh<1>(weights + i * first, values, D, stride, row_lo[i], row_hi[i] < all_lo ? row_hi[i] : all_lo,
                 acc + i * stride);
      }
      switch (n) {
        case 4: weigh<4>(weights, values, D, stride, all_lo, all_hi, acc); break;
        case 3: weigh<3>(weights, values, D, stride, all_lo, all_hi, acc); break;
        case 2: weigh<2>(weights, values, D, stride, all_lo, all_hi, acc); break;
        default: weigh<1>(weights, values, D, stride, all_lo, all_hi, acc);
      }
      for (int i = 0; i < n; ++i) {
        weigh<1>(weights + i * first, values, D, stride, all_hi > row_lo[i] ? all_hi : row_lo[i], row_hi[i],
                 acc + i * stride);
        if (hi[r + i] % kOnce && lo[r + i] < hi[r + i] && hi[r + i] / kOnce >= from && hi[r + i] / kOnce < to)
          weigh_half(hi[r + i] - 1, weights + i * first, values, w, acc + i * stride);
      }
    }
  }

  // Of a pair of keys that a row sees one of, the other's value counts as zero, whatever it is.
  void weigh_half(int key, const E* weights, const T* const* values, const Scratch& w, float* acc) const {
    const T* pair[2] = {static_cast<const T*>(w.zeros), static_cast<const T*>(w.zeros)};
    pair[key % 2] = values[key];
    weigh<1>(weights + key / 2, pair, D, stride, 0, 1, acc);
  }

  static const E* weights_of(const Scratch& w, int r) {
    if constexpr (kAtOnce<E> == 2) return reinterpret_cast<const E*>(w.weights + r * kSplit);
    else return w.s + r * kSplit;
  }

  const AttentionParams& p;
  const int D;
  const int64_t stride, group;

 public:
  const bool tiles;  // this call runs on AMX
};

template <class T, class E = float>
void run(const AttentionParams& p) {
  const Attention<T, E> attention(p);
  const int64_t stride = padded(p.head_dim), group = p.heads / p.kv_heads;
  if (p.batch == 0 || p.width == 0) return;
  const Plan plan = make_plan(p, stride);
  const int64_t scratch = padded(Scratch::floats(stride, p.fp8_cache)), partial = State::floats(stride);
  const int64_t floats = plan.threads * scratch + (plan.by_split ? plan.items * partial + plan.tasks : 0);
  float* memory = static_cast<float*>(t_workspace.get(size_t(floats) * sizeof(float)));
  float* partials = memory + plan.threads * scratch;
  int32_t* done = reinterpret_cast<int32_t*>(partials + plan.items * partial);
  if (plan.by_split) std::memset(done, 0, size_t(plan.tasks) * 4);
  int64_t next_item = 0, next_scratch = 0;
  parallel_for(plan.threads, 1, [&](int64_t, int64_t) {
    const Scratch w(memory + __atomic_fetch_add(&next_scratch, 1, __ATOMIC_RELAXED) * scratch, stride);
    attention.prepare(w);
    if (attention.tiles) open_tiles();
    for (;;) {
      // The last chunks go first: under a causal mask they are the longest.
      const int64_t item = plan.items - 1 - __atomic_fetch_add(&next_item, 1, __ATOMIC_RELAXED);
      if (item < 0) break;
      const int64_t index = plan.by_split ? item / plan.splits : item;
      const int64_t pair = index % (p.batch * p.kv_heads), row0 = index / (p.batch * p.kv_heads) * plan.chunk;
      Task t{Request(p, pair / p.kv_heads), pair % p.kv_heads, row0, 0};
      t.count = int(clamp(t.request.rows * group - row0, 0, plan.chunk));
      if (t.count == 0) continue;
      const State total(w.total, stride);
      attention.load_queries(t, w);
      if (plan.by_split) {
        float* first = partials + index * plan.splits * partial;
        attention.split(t, plan.first_split + item % plan.splits, w,
                        State(first + item % plan.splits * partial, stride));
        if (__atomic_add_fetch(&done[index], 1, __ATOMIC_ACQ_REL) < plan.splits) continue;
        attention.start(t, total);
        for (int64_t s = 0; s < plan.splits; ++s) attention.combine(t, total, State(first + s * partial, stride));
      } else {
        attention.start(t, total);
        const int64_t i0 = row0 / group, i1 = (row0 + t.count - 1) / group;
        const int64_t lo = t.request.first(p, i0) / kSplit, hi = ceil_div(t.request.last(p, i1), kSplit);
        for (int64_t s = lo; s < hi; ++s) {
          const State part(w.partial, stride);
          attention.split(t, s, w, part);
          attention.combine(t, total, part);
        }
      }
      attention.finish(t, total);
    }
    if (attention.tiles) close_tiles();
  });
}

}  // namespace

void block_attention(const AttentionParams& p) {
#if DFLASH_ATTENTION_PAIRS
  if (p.dtype == Dtype::bf16 && p.head_dim % 32 == 0) return run<bf16, Pair>(p);
#endif
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
