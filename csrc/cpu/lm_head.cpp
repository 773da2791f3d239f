#include "cpu/lm_head.h"

#include "cpu/argmax.h"
#include "cpu/gemm.h"
#include "cpu/logits.h"
#include "cpu/parallel.h"

namespace dflash::DFLASH_ISA {
namespace {

// The winners of rows [r0, r0 + rows) among the blocks that one thread sees, combined into p.ids and p.values under a
// lock.
template <class T>
struct ArgmaxEpilogue {
  const LmHeadArgmaxParams& p;
  int* lock;
  int64_t first = -1;
  int count = 0;
  Best best[kPanelRows];

  void operator()(const float* c, int64_t ldc, int64_t r0, int rows, int64_t n0) {
    const int64_t panel = r0 / kPanelRows * kPanelRows, num_valid = p.logits.num_valid;
    if (panel != first) start(panel);
    for (int r = 0; r < rows; ++r) {
      const int at = int(r0 - panel) + r;
      if (at >= count) count = at + 1;
      for (int v = 0; v < kBlock && n0 + v < num_valid; v += Vec::W) {
        const int m = int(num_valid - n0 - v < Vec::W ? num_valid - n0 - v : Vec::W);
        const Vec y = rounded<T>(finish_logits<T>(p.logits, load(c + r * ldc + v), n0 + v, m));
        if (!any_not_less(y, best[at].value)) continue;
        float lane[Vec::W];
        store(lane, y);
        for (int i = 0; i < m; ++i)
          if (const Best found{lane[i], n0 + v + i}; wins(found, best[at])) best[at] = found;
      }
    }
  }
  void start(int64_t panel) {
    combine();
    first = panel;
    count = 0;
    for (int r = 0; r < kPanelRows; ++r) best[r] = {-INFINITY, kNoId};
  }
  void combine() {
    if (first < 0) return;
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE)) {}
    for (int r = 0; r < count; ++r)
      if (wins(best[r], {p.values[first + r], p.ids[first + r]}))
        p.values[first + r] = best[r].value, p.ids[first + r] = best[r].index;
    __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
  }
};

template <class T>
void run(const LmHeadArgmaxParams& p) {
  const GemmParams& g = p.logits.gemm;
  for (int64_t r = 0; r < g.rows; ++r) p.values[r] = -INFINITY, p.ids[r] = kNoId;
  int lock = 0;
  const int64_t blocks = ceil_div(p.logits.num_valid, kBlock);
  parallel_for(blocks, gemm_grain(g), [&](int64_t begin, int64_t end) {
    ArgmaxEpilogue<T> epilogue{p, &lock, -1, 0, {}};
    gemm_blocks(g, begin, end, 1, epilogue);
    epilogue.combine();
  });
  for (int64_t r = 0; r < g.rows; ++r) p.ids[r] += p.id_offset;
}

}  // namespace

void lm_head_argmax(const LmHeadArgmaxParams& p) {
  switch (p.logits.gemm.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

void combine_argmax(const CombineArgmaxParams& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    Best best{p.values[r], p.ids[r]};
    for (int64_t s = 1; s < p.shards; ++s)
      if (const Best found{p.values[s * p.rows + r], p.ids[s * p.rows + r]}; wins(found, best)) best = found;
    p.out_values[r] = best.value;
    p.out_ids[r] = best.index;
  }
}

}  // namespace dflash::DFLASH_ISA
