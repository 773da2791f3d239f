// Attention in splits of kSplit ABSOLUTE positions. A split is one exact softmax over its visible keys; splits are
// combined in order with the usual rescaling. So a row's arithmetic is fixed by its own position and visible keys, and
// any thread may do any split: with few rows in flight the context is split over threads, and no bit moves.
//
// The keys that a row sees are one interval of positions. Nothing outside it is multiplied by zero: it is skipped, so
// that NaN in a neighbour's key, or in a page that nobody sees, reaches no row.
#include "cpu/attention.h"

#include <utility>

#include "cpu/attention_amx.h"
#include "cpu/attention_piece.h"

namespace dflash::DFLASH_ISA {
namespace {

// E: what multiply-adds take of a row, see attention_keys.h.
template <class T, class E>
class Attention {
 public:
  explicit Attention(const AttentionParams& params)
      : p(params), D(int(params.head_dim)), stride(padded(params.head_dim)), group(params.heads / params.kv_heads),
        tiles(kHasTiles<T> && params.head_dim % 32 == 0) {}

  // The splits that a task sees something of: [begin_of, end_of).
  int64_t begin_of(const Task& t) const { return t.request.first(p, t.row0 / group) / kSplit; }
  int64_t end_of(const Task& t) const {
    return ceil_div(t.request.last(p, (t.row0 + t.count - 1) / group), kSplit);
  }

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
      rows[r] = static_cast<const T*>(p.q) + t.request.at(p, p.q_stride) + row / group * p.q_stride[1] +
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

  // Finds a piece's keys and values.
  void locate(Piece<T>& piece, const Scratch& w) const {
    const Task& t = piece.task;
    const int64_t base = piece.number * kSplit;
    piece.begin = kSplit, piece.end = piece.narrow = 0;
    for (int r = 0; r < t.count; ++r) {
      const int64_t i = (t.row0 + r) / group;
      const int lo = piece.lo[r] = int(clamp(t.request.first(p, i) - base, 0, kSplit));
      const int hi = piece.hi[r] = int(clamp(t.request.last(p, i) - base, 0, kSplit));
      if (lo >= hi) continue;
      piece.begin = lo < piece.begin ? lo : piece.begin;
      piece.end = hi > piece.end ? hi : piece.end;
    }
    if (piece.begin >= piece.end) return;
    find_rows(piece, base, w);
    if (p.fp8_cache) piece.narrow = int(clamp(t.request.context - base, 0, piece.end));
  }

  // Weights of the piece's keys, a softmax of their own for all rows. Rows that see nothing get sum 0, max -inf.
  void score(Piece<T>& piece, const Scratch& w, const State& out) const {
    for (int r = 0; r < piece.task.count; ++r) out.max[r] = -INFINITY, out.sum[r] = 0.0f;
    const int begin = piece.begin, end = piece.end, *lo = piece.lo, *hi = piece.hi;
    if (begin >= end || tiles) return;
    const float* value_scale = scale_cached(piece, w);
    widen(piece, piece.keys, w, w.cached_k);
    for (int tile = begin & -kTile; tile < end; tile += kTile) {
      const bool more = tile + kTile < end;
      score_tile<E>(p, piece, tile, more ? piece.tile_of(piece.keys, tile + kTile, D)
                                         : piece.tile_of(piece.values, begin & -kTile, D), w);
    }
    for (int r = 0; r < piece.task.count; ++r) {
      if (lo[r] >= hi[r]) continue;
      softmax(w.s + r * kSplit, lo[r], hi[r], value_scale, weights_of(w) + r * kSplit, out.max + r, out.sum + r);
    }
  }

  // The weighed sum of the piece's values. The keys of `next`, or null, are asked for meanwhile.
  void weigh(Piece<T>& piece, const Scratch& w, const State& out, Piece<T>* next) const {
    const int begin = piece.begin, end = piece.end;
    if (begin >= end) return;
#if DFLASH_ATTENTION_AMX
    if constexpr (kHasTiles<T>)
      if (tiles) {
        const float* value_scale = scale_cached(piece, w);
        widen(piece, piece.keys, w, w.cached_k);
        widen(piece, piece.values, w, w.cached_v);
        return split_amx(p, piece.task.count, begin, end, piece.lo, piece.hi, piece.keys, piece.values, value_scale, w,
                         out);
      }
#endif
    widen(piece, piece.values, w, w.cached_v);
    if (next && next->begin >= next->end) next = nullptr;
    for (int64_t i = 0; i < piece.task.count * stride; ++i) out.acc[i] = 0.0f;
    for (int tile = begin & -kTile; tile < end; tile += kTile) {
      Rows ahead = piece.tile_of(piece.values, tile + kTile, D);
      if (tile + kTile >= end && next) ahead = next->tile_of(next->keys, next->begin & -kTile, D);
      weigh_tile(piece, tile, reinterpret_cast<const E*>(weights_of(w)), ahead, D, w, out.acc);
    }
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

  void finish(const Task& t, const State& total) const {
    for (int r = 0; r < t.count; ++r) {
      const int64_t row = t.row0 + r;
      T* out = static_cast<T*>(p.out) + t.request.at(p, p.out_stride) + row / group * p.out_stride[1] +
               (t.h * group + row % group) * p.out_stride[2];
      const Vec sum = set1(total.sum[r] == 0.0f ? 1.0f : total.sum[r]);
      for (int d = 0; d < D; d += W) store_n(out + d, load(total.acc + r * stride + d) / sum, D - d);
    }
  }

 private:
  // Where the K and V rows of the positions that the piece sees are; the rest of the tiles points at zeros.
  void find_rows(Piece<T>& piece, int64_t base, const Scratch& w) const {
    const Task& t = piece.task;
    const Request& request = t.request;
    const int begin = piece.begin, end = piece.end;
    const T **keys = piece.keys, **values = piece.values;
    const T *zeros = static_cast<const T*>(w.zeros), *nans = static_cast<const T*>(w.nans);
    for (int j = begin & -kTile; j < begin; ++j) keys[j] = values[j] = zeros;
    for (int j = end; j < ((end + kTile - 1) & -kTile); ++j) keys[j] = values[j] = zeros;
    int j = begin;
    while (j < end && base + j < request.context) {
      const int64_t index = (base + j) / p.page_size, row = base + j - index * p.page_size;
      const int64_t page = index < p.max_pages ? p.page_table[request.b * p.page_table_stride + index] : -1;
      const int64_t there = clamp(p.page_size - row, 0, clamp(request.context - base, 0, end) - j);
      if (page < 0 || page >= p.num_pages) {
        for (int i = 0; i < there; ++i) keys[j + i] = values[j + i] = nans;
      } else {
        cached_rows(p.k_cache, p.k_cache_stride, page, row, t.h, there, keys + j);
        cached_rows(p.v_cache, p.v_cache_stride, page, row, t.h, there, values + j);
      }
      j += int(there);
    }
    const T* k = static_cast<const T*>(p.k) + request.at(p, p.k_stride) + t.h * p.k_stride[2];
    const T* v = static_cast<const T*>(p.v) + request.at(p, p.v_stride) + t.h * p.v_stride[2];
    for (; j < end; ++j) {
      keys[j] = k + (base + j - request.context) * p.k_stride[1];
      values[j] = v + (base + j - request.context) * p.v_stride[1];
    }
  }

  void cached_rows(const void* cache, const int64_t (&strides)[3], int64_t page, int64_t row, int64_t h, int64_t count,
                   const T** to) const {
    const int64_t size = p.fp8_cache ? 1 : sizeof(T), step = strides[1] * size;
    const char* first =
        static_cast<const char*>(cache) + (page * strides[0] + row * strides[1] + h * strides[2]) * size;
    for (int64_t i = 0; i < count; ++i) to[i] = reinterpret_cast<const T*>(first + i * step);
  }

  // Replaces the rows of an fp8 cache by the same numbers of T, in `wide`.
  void widen(Piece<T>& piece, const T** rows, const Scratch& w, void* wide) const {
    for (int j = piece.begin; j < piece.narrow; ++j) {
      if (rows[j] == w.nans) continue;
      T* to = static_cast<T*>(wide) + j * stride;
      widen_row(reinterpret_cast<const fp8*>(rows[j]), to, D);
      rows[j] = to;
    }
  }

  // An fp8 cache's scales belong to the keys of the context alone, which come before the block's.
  const float* scale_cached(const Piece<T>& piece, const Scratch& w) const {
    if (!p.fp8_cache) return nullptr;
    const float *k = scale_of(p.k_scale, piece.task.h), *v = scale_of(p.v_scale, piece.task.h);
    for (int j = 0; j < kSplit; ++j) {
      w.key_scale[j] = k && j < piece.narrow ? p.scale * *k : p.scale;
      w.value_scale[j] = v && j < piece.narrow ? *v : 1.0f;
    }
    return w.value_scale;
  }

  // Of w, (rows, kSplit).
  static auto weights_of(const Scratch& w) {
    if constexpr (kAtOnce<E> == 2) return w.weights;
    else return w.s;
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
  // The longest go first: the last chunks, under a causal mask, and of splits all but the last.
  const auto take = [&](Piece<T>& piece) {
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next_item, 1, __ATOMIC_RELAXED);
      if (item >= plan.items) return false;
      piece.index = plan.by_split ? item % plan.tasks : plan.tasks - 1 - item;
      const Plan::Range range = plan[piece.index];
      Task& t = piece.task = {Request(p, range.pair / p.kv_heads), range.pair % p.kv_heads, range.row, 0};
      t.count = int(clamp(t.request.rows * group - range.row, 0, range.count));
      piece.number = plan.by_split ? plan.first_split + item / plan.tasks : attention.begin_of(t);
      piece.first = true;
      if (t.count > 0) return true;
    }
  };
  parallel_for(plan.threads, 1, [&](int64_t, int64_t) {
    const Scratch w(memory + __atomic_fetch_add(&next_scratch, 1, __ATOMIC_RELAXED) * scratch, stride);
    attention.prepare(w);
    if (attention.tiles) open_tiles();
    // What follows `now`, or is first: the task's next split or, where that was the last, another item.
    const auto follow = [&](const Piece<T>* now, Piece<T>& next) {
      if (now && !now->last) {
        next.task = now->task, next.index = now->index, next.number = now->number + 1, next.first = false;
      } else if (!take(next)) {
        return false;
      }
      next.last = plan.by_split || next.number + 1 >= attention.end_of(next.task);
      attention.locate(next, w);
      return true;
    };
    Piece<T> pieces[2] = {Piece<T>(p), Piece<T>(p)}, *now = pieces, *next = pieces + 1;
    const State total(w.total, stride);
    for (bool more = follow(nullptr, *now); more; std::swap(now, next)) {
      const Task& t = now->task;
      float* first = partials + now->index * plan.splits * partial;
      const State part(plan.by_split ? first + (now->number - plan.first_split) * partial : w.partial, stride);
      if (now->first) attention.load_queries(t, w);
      if (now->first && !plan.by_split) attention.start(t, total);
      attention.score(*now, w, part);
      // Taken no earlier, so that the last items are shared out evenly.
      more = follow(now, *next);
      attention.weigh(*now, w, part, more ? next : nullptr);
      if (!plan.by_split) {
        combine(t.count, stride, total, part);
        if (now->last) attention.finish(t, total);
      } else if (__atomic_add_fetch(&done[now->index], 1, __ATOMIC_ACQ_REL) == plan.splits) {
        attention.start(t, total);
        for (int64_t s = 0; s < plan.splits; ++s) combine(t.count, stride, total, State(first + s * partial, stride));
        attention.finish(t, total);
      }
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
