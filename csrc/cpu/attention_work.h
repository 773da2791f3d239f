// How a call of block_attention is cut into tasks, and the memory that they work in.
#pragma once

#include <cfloat>

#include "cpu/attention.h"
#include "cpu/attention_tile.h"
#include "cpu/fp8.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kRows = 32;  // query rows of one key head that share converted keys and values

inline int64_t clamp(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }
inline int64_t padded(int64_t n) { return (n + 15) & ~int64_t{15}; }

// One request's lengths, clamped to what exists.
struct Request {
  int64_t b, start, context, rows, packed_at = 0;
  Request(const AttentionParams& p, int64_t request) : b(request) {
    context = p.context_lens[b] > 0 ? p.context_lens[b] : 0;
    rows = p.block_lens ? clamp(p.block_lens[b], 0, p.width) : p.width;
    if (p.block_starts) {
      packed_at = clamp(p.block_starts[b], 0, p.packed_rows);
      rows = clamp(rows, 0, p.packed_rows - packed_at);
    }
    start = p.context_starts ? clamp(p.context_starts[b], 0, context) : 0;
    if (p.page_size == 0) start = context;  // no cache; a cache of no pages still has a page size
    // Of a context that the table cannot hold, whoever sees any of it sees the last token, which has no page. That one
    // alone is looked at.
    if (start < context && (context - 1) / p.page_size >= p.max_pages) start = context - 1;
  }
  // Where the block's first row is, by the strides of a tensor of rows.
  int64_t at(const AttentionParams& p, const int64_t (&stride)[3]) const {
    return p.block_starts ? packed_at * stride[1] : b * stride[0];
  }
  // Visible positions of query i: [first(i), last(i)).
  int64_t first(const AttentionParams& p, int64_t i) const {
    return p.left >= 0 && context + i - p.left > start ? context + i - p.left : start;
  }
  int64_t last(const AttentionParams& p, int64_t i) const {
    int64_t end = context + rows;
    if (p.right >= 0 && context + i + p.right + 1 < end) end = context + i + p.right + 1;
    if (p.causal && context + i + 1 < end) end = context + i + 1;
    return end;
  }
};

// Rows [row0, row0 + count) of key head h's group, query-major: row = query * group + member.
struct Task {
  Request request;
  int64_t h, row0;
  int count;
};

// One thread's buffers. q holds elements of E; packed_q, packed_v and values are AMX's; the last two hold a split of an
// fp8 cache.
struct Scratch {
  float *q, *s, *partial, *total, *keys, *values, *key_scale, *value_scale;
  void *zeros, *nans;
  bf16 *packed_q, *weights, *packed_v;
  void *cached_k, *cached_v;
  static int64_t floats(int64_t stride, bool fp8_cache) {
    return kRows * (3 * stride + kSplit + 4) + (2 * kTile + 2) * stride + 2 * kSplit +
           (kRows * (stride + kSplit) + kSplit * stride) / 2 + (fp8_cache ? 2 * kSplit * stride : 0);
  }
  Scratch(float* base, int64_t stride) {
    const auto take = [&](int64_t n) { return (base += n) - n; };
    q = take(kRows * stride);
    partial = take(kRows * (stride + 2));
    total = take(kRows * (stride + 2));
    s = take(kRows * kSplit);
    keys = take(kTile * stride);
    values = take(kTile * stride);
    zeros = take(stride);
    nans = take(stride);
    packed_q = reinterpret_cast<bf16*>(take(kRows * stride / 2));
    weights = reinterpret_cast<bf16*>(take(kRows * kSplit / 2));
    packed_v = reinterpret_cast<bf16*>(take(kSplit * stride / 2));
    key_scale = take(kSplit);
    value_scale = take(kSplit);
    cached_k = base;
    cached_v = base + kSplit * stride;
  }
};

// The unnormalised result of some keys for `count` rows: max[count], sum[count], acc[count][stride].
struct State {
  float *max, *sum, *acc;
  State(float* base, int64_t stride) : max(base), sum(base + kRows), acc(base + 2 * kRows) { (void)stride; }
  static int64_t floats(int64_t stride) { return kRows * (stride + 2); }
};

// Adds a part to the total: both are scaled to the larger maximum. A part without visible keys changes nothing.
inline void combine(int count, int64_t stride, const State& total, const State& part) {
  float a[kRows], b[kRows], sums[kRows];
  for (int r = 0; r < count; r += W) {
    const Vec before = load(total.max + r), here = load(part.max + r), m = vmax(before, here);
    const Vec old = select_lt(before, set1(-FLT_MAX), set1(0.0f), vexp(before - m)), add = vexp(here - m);
    store(a + r, old);
    store(b + r, add);
    store(sums + r, fma(load(part.sum + r), add, load(total.sum + r) * old));
  }
  for (int r = 0; r < count; ++r) {
    if (part.sum[r] == 0.0f) continue;
    total.max[r] = total.max[r] > part.max[r] ? total.max[r] : part.max[r];
    total.sum[r] = sums[r];
    float* to = total.acc + r * stride;
    for (int64_t d = 0; d < stride; d += W)
      store(to + d, fma(load(part.acc + r * stride + d), set1(b[r]), load(to + d) * set1(a[r])));
  }
}

thread_local ThreadMemory t_workspace;

// How the call is cut into items, and what they share. The last tasks can have fewer rows than the others: `whole` come
// before them.
struct Plan {
  int64_t pairs, chunk, whole, parts, part, tasks, first_split, splits, items;
  int threads;
  bool by_split;

  // Of a request's key head `pair`, rows [row, row + count).
  struct Range {
    int64_t pair, row, count;
  };
  Range operator[](int64_t task) const {
    if (task < whole) return {task % pairs, task / pairs * chunk, chunk};
    return {whole + (task - whole) / parts, (task - whole) % parts * part, part};
  }
};

// Rows that take longer than loading their keys once more.
#if defined(__AVX512BF16__)
constexpr int64_t kLeastRows = 16;
#else
constexpr int64_t kLeastRows = W / 2;
#endif
constexpr int64_t kMaxPartials = int64_t{32} << 20;  // floats: 128 MiB; beyond it tasks alone are spread over threads

Plan make_plan(const AttentionParams& p, int64_t stride) {
  int64_t first = INT64_MAX, last = 0, work = 0, rows = 1;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Request request(p, b);
    if (request.rows == 0) continue;
    if (request.rows * (p.heads / p.kv_heads) > rows) rows = request.rows * (p.heads / p.kv_heads);
    const int64_t lo = request.first(p, 0), hi = request.last(p, request.rows - 1);
    if (lo >= hi) continue;
    first = lo / kSplit < first ? lo / kSplit : first;
    last = ceil_div(hi, kSplit) > last ? ceil_div(hi, kSplit) : last;
    work += (request.rows * p.heads + 4 * p.kv_heads) * (hi - lo) * stride;
  }
  Plan plan{};
  const int64_t chunks = ceil_div(rows, kRows);
  plan.pairs = p.batch * p.kv_heads;
  plan.chunk = (ceil_div(rows, chunks) + 3) & -4;
  plan.tasks = plan.whole = plan.pairs * chunks;
  plan.first_split = first < last ? first : 0;
  plan.splits = first < last ? last - first : 0;
  constexpr int64_t kWorthAThread = 30000;  // multiply-adds: a microsecond or two, in which one thread waits for reads
  plan.threads = int(clamp(work / kWorthAThread, 1, num_threads()));
  // Of few key heads those that are left when every thread has as many are cut by rows: three heads of two threads take
  // three halves of their time, not two wholes. Both halves convert the keys.
  const int64_t left = plan.tasks % plan.threads;
  const bool cut = left && chunks == 1 && plan.tasks < 4 * plan.threads && rows >= 2 * kLeastRows;
  plan.parts = cut ? clamp(plan.threads / left, 1, rows / kLeastRows) : 1;
  plan.part = ceil_div(rows, plan.parts);
  if (plan.parts > 1) plan.whole -= left, plan.tasks += left * (plan.parts - 1);
  plan.by_split = plan.threads > 1 && plan.splits > 1 && plan.tasks < 4 * plan.threads &&
               plan.tasks * plan.splits * State::floats(stride) <= kMaxPartials;
  plan.items = plan.by_split ? plan.tasks * plan.splits : plan.tasks;
  plan.threads = int(clamp(plan.threads, 1, plan.items));
  return plan;
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
