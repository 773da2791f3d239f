// The head's K best tokens and the log-sum-exp of its logits, which never leave the cache.
//
// The K best are the same in whatever order they are found, as no two candidates are equal: each thread keeps its own,
// and they are combined at the end. A sum is not, so the vocabulary is cut into units of kUnit blocks, counted from its
// start: a unit's logits meet in a buffer of the thread that computes them all, which takes their maximum and the sum
// of exponentials below it, and the units are added in order. So lse depends on its row of x and on the weight, not on
// the other rows or on how the units are shared out. A unit whose maximum is below the K-th best holds no candidate.
#include "cpu/argmax.h"
#include "cpu/gemm.h"
#include "cpu/lm_head.h"
#include "cpu/logits.h"
#include "cpu/parallel.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int64_t kUnit = 8;
constexpr int64_t kUnitLogits = kUnit * kBlock;

// What exponentials are taken relative to: nothing is subtracted from an infinity.
inline float base_of(float max) { return max > -INFINITY && max < INFINITY ? max : 0.0f; }

// What the threads share: the best so far of every row, (rows, k), under the lock, and each unit's maximum and sum of
// exp(logit - base_of(maximum)), (rows, units) with units filled up to whole vectors.
struct Found {
  Best* best;
  float *max, *sum;
  int64_t units;
  int lock;
};

template <class T>
class TopkEpilogue {
 public:
  TopkEpilogue(const LmHeadTopkParams& p, Found& found, int64_t begin, int64_t end)
      : p_(p), found_(found), begin_(begin), stream_(stream_length(begin, end, kUnit)) {
    static thread_local ThreadMemory memory;
    panel_rows_ = p.logits.gemm.rows < kPanelRows ? p.logits.gemm.rows : kPanelRows;
    const size_t logits = kStreams * panel_rows_ * kUnitLogits * sizeof(T);
    logits_ = static_cast<T*>(memory.get(logits + panel_rows_ * p.k * sizeof(Best)));
    best_ = reinterpret_cast<Best*>(reinterpret_cast<char*>(logits_) + logits);
  }

  void operator()(const float* c, int64_t ldc, int64_t r0, int rows, int64_t n0) {
    const int64_t panel = r0 / kPanelRows * kPanelRows;
    if (panel != panel_) start(panel);
    const int64_t num_valid = p_.logits.num_valid, block = n0 / kBlock, place = block % kUnit;
    const bool last = place == kUnit - 1 || n0 + kBlock >= num_valid;
    // A unit is under way in each stream; the rest of the range is walked one at a time.
    const int64_t slot = block < begin_ + kStreams * stream_ ? (block - begin_) / stream_ : 0;
    T* to = logits_ + (slot * panel_rows_ + r0 - panel) * kUnitLogits;
    for (int r = 0; r < rows; ++r, to += kUnitLogits) {
      T* y = to + place * kBlock;
      for (int v = 0; v < kBlock && n0 + v < num_valid; v += Vec::W)
        store(y + v, finish_logits<T>(p_.logits, load(c + r * ldc + v), n0 + v,
                                      int(num_valid - n0 - v < Vec::W ? num_valid - n0 - v : Vec::W)));
      for (int64_t i = num_valid - n0; i < kBlock; ++i) y[i] = from_float<T>(-INFINITY);
      if (last) finish_unit(to, (place + 1) * kBlock, r0 + r, block / kUnit);
    }
  }

  void combine() {
    if (panel_ < 0) return;
    const int64_t rows = p_.logits.gemm.rows - panel_ < kPanelRows ? p_.logits.gemm.rows - panel_ : kPanelRows;
    while (__atomic_exchange_n(&found_.lock, 1, __ATOMIC_ACQUIRE)) {}
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < p_.k; ++i)
        if (!insert(found_.best + (panel_ + r) * p_.k, p_.k, best_[r * p_.k + i])) break;
    __atomic_store_n(&found_.lock, 0, __ATOMIC_RELEASE);
  }

 private:
  void start(int64_t panel) {
    combine();
    panel_ = panel;
    for (int64_t i = 0; i < panel_rows_ * p_.k; ++i) best_[i] = {-INFINITY, kNoId};
  }

  void finish_unit(const T* y, int64_t n, int64_t row, int64_t unit) {
    Vec top = load(y);
    for (int64_t i = Vec::W; i < n; i += Vec::W) top = vmax(top, load(y + i));
    const float max = reduce_max(top);
    const Vec base = set1(base_of(max));
    Vec sums = set1(0.0f);
    if (max > -INFINITY && max < INFINITY)
      for (int64_t i = 0; i < n; i += Vec::W) sums = sums + vexp_below(load(y + i) - base);
    else
      for (int64_t i = 0; i < n; i += Vec::W) sums = sums + vexp(load(y + i));
    const float sum = reduce_add(sums);
    found_.max[row * found_.units + unit] = max;
    found_.sum[row * found_.units + unit] = sum;
    Best* best = best_ + (row - panel_) * p_.k;
    const Best& kth = best[p_.k - 1];
    // Where a logit is NaN, max may be anything.
    if (max < kth.value && !is_nan(sum)) return;
    const int64_t first = unit * kUnitLogits;
    for (int64_t i = 0; i < n; i += Vec::W) {
      if (!any_not_less(load(y + i), kth.value)) continue;
      for (int64_t id = first + i; id < first + i + Vec::W && id < p_.logits.num_valid; ++id)
        if (const float value = to_float(y[id - first]); !(value < kth.value)) insert(best, p_.k, {value, id});
    }
  }

  const LmHeadTopkParams& p_;
  Found& found_;
  const int64_t begin_, stream_;
  int64_t panel_rows_, panel_ = -1;
  T* logits_;   // (kStreams, panel_rows_, kUnitLogits)
  Best* best_;  // (panel_rows_, k)
};

// log sum_i sum[i] * exp(max[i]), for n a multiple of a vector's lanes.
inline float log_sum(const float* max, const float* sum, int64_t n) {
  Vec top = load(max);
  for (int64_t i = Vec::W; i < n; i += Vec::W) top = vmax(top, load(max + i));
  const float base = base_of(reduce_max(top));
  Vec total = set1(0.0f);
  for (int64_t i = 0; i < n; i += Vec::W) total = fma(load(sum + i), vexp(load(max + i) - set1(base)), total);
  return float(base + std::log(double(reduce_add(total))));
}

template <class T>
void run(const LmHeadTopkParams& p) {
  const GemmParams& g = p.logits.gemm;
  const int64_t blocks = ceil_div(p.logits.num_valid, kBlock), units = ceil_div(blocks, kUnit);
  const int64_t padded = ceil_div(units, Vec::W) * Vec::W;
  static thread_local ThreadMemory memory;
  const size_t bytes = g.rows * (p.k * sizeof(Best) + 2 * padded * sizeof(float));
  if (bytes == 0) return;
  Best* best = static_cast<Best*>(memory.get(bytes));
  float* max = reinterpret_cast<float*>(best + g.rows * p.k);
  Found found{best, max, max + g.rows * padded, padded, 0};
  for (int64_t i = 0; i < g.rows * p.k; ++i) found.best[i] = {-INFINITY, kNoId};
  for (int64_t r = 0; r < g.rows; ++r)
    for (int64_t u = units; u < padded; ++u) found.max[r * padded + u] = -INFINITY, found.sum[r * padded + u] = 0.0f;
  parallel_for(units, ceil_div(gemm_grain(g), kUnit), [&](int64_t from, int64_t to) {
    const int64_t begin = from * kUnit, end = to * kUnit < blocks ? to * kUnit : blocks;
    TopkEpilogue<T> epilogue(p, found, begin, end);
    gemm_blocks(g, begin, end, kUnit, epilogue);
    epilogue.combine();
  });
  for (int64_t i = 0; i < g.rows * p.k; ++i)
    p.ids[i] = found.best[i].index + p.id_offset, p.values[i] = found.best[i].value;
  for (int64_t r = 0; r < g.rows; ++r)
    p.lse[r] = log_sum(found.max + r * padded, found.sum + r * padded, padded);
}

}  // namespace

void lm_head_topk(const LmHeadTopkParams& p) {
  switch (p.logits.gemm.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

void combine_topk(const CombineTopkParams& p) {
  parallel_for(p.rows, 1 + 4096 / (p.shards * p.k), [&](int64_t begin, int64_t end) {
    static thread_local ThreadMemory memory;
    Best* best = static_cast<Best*>(memory.get(p.k * sizeof(Best)));
    for (int64_t r = begin; r < end; ++r) {
      float max = -INFINITY;
      for (int64_t i = 0; i < p.k; ++i) best[i] = {-INFINITY, kNoId};
      for (int64_t s = 0; s < p.shards; ++s) {
        const int64_t row = s * p.rows + r;
        for (int64_t i = row * p.k; i < (row + 1) * p.k; ++i) insert(best, p.k, {p.values[i], p.ids[i]});
        if (p.lse[row] > max) max = p.lse[row];
      }
      for (int64_t i = 0; i < p.k; ++i)
        p.out_ids[r * p.k + i] = best[i].index, p.out_values[r * p.k + i] = best[i].value;
      const double base = base_of(max);
      double sum = 0.0;
      for (int64_t s = 0; s < p.shards; ++s) sum += std::exp(p.lse[s * p.rows + r] - base);
      p.out_lse[r] = float(base + std::log(sum));
    }
  });
}

}  // namespace dflash::DFLASH_ISA
