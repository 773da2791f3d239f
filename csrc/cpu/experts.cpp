// Floor: the bytes of the chosen experts over the read bandwidth.
//
// Rows are sorted by expert first: a pair is a row and one of its experts, and the pairs of one expert lie together. A
// product walks all blocks of all chosen experts, in portions that threads take from one another, so that the time of a
// step does not depend on which experts were chosen by many rows. A portion is one product of gemm.h, whose rows are an
// expert's pairs: blocks are read once, and stay in the second-level cache where an expert has more rows than a panel.
#include "cpu/experts.h"

#include <atomic>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/silu.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int64_t kPairs = 2048;             // at once: what the memory between the products is for
constexpr int64_t kPortionBytes = 1 << 20;   // of a weight: long enough for streams, short enough to share
constexpr int64_t kSumsTile = 1024;          // outputs of a row that a thread adds up
constexpr float kAlpha = 1.702, kLimit = 7.0;  // of the clamped activation; as in dflash_kernels/_constants.py

// The pairs of some rows, sorted by expert and row.
struct Plan {
  int64_t pairs, chosen;        // chosen: experts with pairs
  const int32_t* experts;       // (chosen,)
  const int32_t* starts;        // (chosen + 1,): where an expert's pairs begin
  const int32_t* rows;          // (pairs,): a pair's row
  const int32_t* places;        // (rows, slots): the pair, or -1
};

int64_t plan_ints(const ExpertMlpParams& p, int64_t rows) { return 3 * p.experts + 1 + 2 * rows * p.slots; }

Plan plan_of(const ExpertMlpParams& p, int64_t row0, int64_t rows, int32_t* memory) {
  int32_t *next = memory, *experts = next + p.experts, *starts = experts + p.experts, *of = starts + p.experts + 1,
          *places = of + rows * p.slots;
  const int32_t* ids = p.ids + row0 * p.slots;
  const auto here = [&](int64_t i) {
    const int64_t e = int64_t(ids[i]) - p.first_expert;
    return e >= 0 && e < p.experts ? e : -1;
  };
  std::memset(next, 0, p.experts * sizeof(int32_t));
  for (int64_t i = 0; i < rows * p.slots; ++i)
    if (here(i) >= 0) ++next[here(i)];
  int64_t chosen = 0;
  int32_t pairs = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int32_t count = next[e];
    next[e] = pairs;
    if (count == 0) continue;
    experts[chosen] = int32_t(e);
    starts[chosen++] = pairs;
    pairs += count;
  }
  starts[chosen] = pairs;
  for (int64_t i = 0; i < rows * p.slots; ++i) {
    const int64_t e = here(i);
    places[i] = e < 0 ? -1 : next[e]++;
    if (e >= 0) of[places[i]] = int32_t(i / p.slots);
  }
  return {pairs, chosen, experts, starts, of, places};
}

// Of a packed weight.
template <class T>
int64_t block_bytes(const ExpertWeights& w) {
  return w.scales ? block_elements<int8_t>(w.k) : block_elements<T>(w.k) * int64_t(sizeof(T));
}

// One expert's weight, as gemm.h takes it.
template <class T>
GemmParams gemm_of(const ExpertWeights& w, int64_t expert, Dtype dtype) {
  const int64_t bytes = w.packed ? ceil_div(w.n, kBlock) * block_bytes<T>(w) : w.n * w.k * int64_t(sizeof(T));
  GemmParams g{};
  g.K = w.k, g.N = w.n, g.dtype = dtype;
  g.weight = static_cast<const char*>(w.data) + expert * bytes;
  g.weight_stride = w.packed ? 0 : w.k;
  g.scales = w.scales ? w.scales + expert * w.n : nullptr;
  g.bias = w.bias ? static_cast<const T*>(w.bias) + expert * w.n : nullptr;
  return g;
}

// sums[pair] = weight of its expert x[pair], plus the bias.
template <class T>
void product(const Plan& plan, const ExpertWeights& w, Dtype dtype, const RowOf<T>* x, int64_t ld, float* sums,
             int64_t sums_stride) {
  const int64_t blocks = ceil_div(w.n, kBlock), bytes = block_bytes<T>(w);
  const int64_t length = ceil_div(ceil_div(kPortionBytes, bytes), kStreams) * kStreams;
  const int64_t portions = ceil_div(blocks, length), threads = num_threads();
  std::atomic<int64_t> next{0};
  parallel_for(threads, plan.chosen * blocks * bytes <= kPortionBytes / 16 ? threads : 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < plan.chosen * portions;) {
      const int64_t c = i / portions, begin = i % portions * length, first = plan.starts[c];
      const int64_t end = begin + length < blocks ? begin + length : blocks;
      GemmParams g = gemm_of<T>(w, plan.experts[c], dtype);
      g.rows = plan.starts[c + 1] - first;
      auto epilogue = [&](const float* t, int64_t ldt, int64_t r0, int n, int64_t n0) {
        store_sums<T>(g, sums, sums_stride, t, ldt, r0, n, n0);
      };
      gemm_prepared(g, x + first * ld, ld, first, begin, end, epilogue);
    }
  });
}

template <bool CLAMPED>
inline Vec activation(Vec gate, Vec up) {
  if constexpr (!CLAMPED) return silu(gate) * up;
  const Vec zero = set1(0.0f), one = set1(1.0f), limit = set1(kLimit);
  // A minimum or maximum with NaN is its second operand.
  gate = vmin(limit, gate), up = vmin(limit, vmax(zero - limit, up));
  return gate / (one + vexp(set1(-kAlpha) * gate)) * (up + one);
}

// The activation of a pair's sums, rounded to T, in the type that the micro-kernels take, zero past `inner`.
template <class T, class X, bool CLAMPED>
inline void activate_row(const float* sums, int64_t inner, X* to) {
  for (int64_t i = 0; i < padded_k(inner); i += Vec::W) {
    const int n = int(inner > i ? inner - i : 0);
    Vec y = set1(0.0f);
    if (n > 0) y = activation<CLAMPED>(load_n(sums + i, n), load_n(sums + inner + i, n));
    if constexpr (!std::is_same_v<T, X>) y = rounded<T>(y);
    store(to + i, y);
  }
}

// Where the parts of a call's memory are.
template <class T>
struct Memory {
  using X = RowOf<T>;
  int64_t x_stride, hidden_stride, sums_stride, x_at, hidden_at, sums_at, bytes;

  Memory(const ExpertMlpParams& p, int64_t rows) {
    const auto whole = [](int64_t n) { return ceil_div(n, 4096) * 4096; };
    const int64_t pairs = rows * p.slots, widest = p.gate_up.n > p.down.n ? p.gate_up.n : p.down.n;
    x_stride = prepared_stride<T>(p.gate_up.k), hidden_stride = prepared_stride<T>(p.down.k);
    sums_stride = (ceil_div(widest, kBlock) | 1) * kBlock;
    x_at = whole(plan_ints(p, rows) * sizeof(int32_t));
    hidden_at = x_at + whole(pairs * x_stride * sizeof(X));
    sums_at = hidden_at + whole(pairs * hidden_stride * sizeof(X));
    bytes = sums_at + pairs * sums_stride * sizeof(float);
  }
};

template <class T, bool CLAMPED>
void some_rows(const ExpertMlpParams& p, int64_t row0, int64_t rows, char* memory) {
  using X = RowOf<T>;
  const Memory<T> at(p, rows);
  X *x = reinterpret_cast<X*>(memory + at.x_at), *hidden = reinterpret_cast<X*>(memory + at.hidden_at);
  float* sums = reinterpret_cast<float*>(memory + at.sums_at);
  const Plan plan = plan_of(p, row0, rows, reinterpret_cast<int32_t*>(memory));
  const int64_t hidden_size = p.gate_up.k, inner = p.down.k, few = 1 + 8 * kGrainElements / hidden_size;
  parallel_for(plan.pairs, few, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      prepare_row(static_cast<const T*>(p.x.data) + (row0 + plan.rows[i]) * p.x.stride, hidden_size,
                  x + i * at.x_stride);
  });
  product<T>(plan, p.gate_up, p.dtype, x, at.x_stride, sums, at.sums_stride);
  parallel_for(plan.pairs, 1 + kGrainElements / inner, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      activate_row<T, X, CLAMPED>(sums + i * at.sums_stride, inner, hidden + i * at.hidden_stride);
  });
  product<T>(plan, p.down, p.dtype, hidden, at.hidden_stride, sums, at.sums_stride);
  const int64_t tiles = ceil_div(hidden_size, kSumsTile);
  parallel_for(rows * tiles, 1 + 8 / (p.slots + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / tiles, from = i % tiles * kSumsTile;
      const int64_t to = from + kSumsTile < hidden_size ? from + kSumsTile : hidden_size;
      const int32_t* places = plan.places + row * p.slots;
      const float* weights = p.weights + (row0 + row) * p.slots;
      T* out = static_cast<T*>(p.out.data) + (row0 + row) * p.out.stride;
      for (int64_t h = from; h < to; h += Vec::W) {
        Vec total = set1(0.0f);
        for (int64_t s = 0; s < p.slots; ++s)
          if (places[s] >= 0)
            total = total + set1(weights[s]) * load_n(sums + places[s] * at.sums_stride + h, int(to - h));
        store_n(out + h, total, int(to - h));
      }
    }
  });
}

template <class T>
void run(const ExpertMlpParams& p) {
  static thread_local ThreadMemory memory;
  const int64_t most = p.slots ? 1 + kPairs / p.slots : p.rows, size = p.rows < most ? p.rows : most;
  char* mine = static_cast<char*>(memory.get(Memory<T>(p, size).bytes));
  for (int64_t row0 = 0; row0 < p.rows; row0 += most) {
    const int64_t rows = p.rows - row0 < most ? p.rows - row0 : most;
    p.clamped ? some_rows<T, true>(p, row0, rows, mine) : some_rows<T, false>(p, row0, rows, mine);
  }
}

}  // namespace

void expert_mlp(const ExpertMlpParams& p) {
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
