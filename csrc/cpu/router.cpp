#include "cpu/router.h"

#include "cpu/argmax.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int64_t kMaxExperts = 1024, kMaxChosen = 64;  // as in dflash_kernels/limits.py
constexpr float kTiny = 1e-20;                          // as in dflash_kernels/_constants.py
constexpr Best kNone{-INFINITY, INT64_MAX};

// y = sigmoid(x)
void sigmoid(const float* x, int64_t n, float* y) {
  const Vec zero = set1(0.0f), one = set1(1.0f);
  for (int64_t i = 0; i < n; i += Vec::W) store(y + i, one / (one + vexp(zero - load(x + i))));
}

// y = softmax(x); x is -inf from n to the end of a vector.
void softmax(const float* x, int64_t n, float* y) {
  Vec top = set1(-INFINITY), sum = set1(0.0f);
  for (int64_t i = 0; i < n; i += Vec::W) top = vmax(load(x + i), top);
  top = set1(reduce_max(top));
  for (int64_t i = 0; i < n; i += Vec::W) {
    const Vec e = vexp(load(x + i) - top);
    store(y + i, e);
    if (i + Vec::W > n)  // all at -inf are NaN, and the ones past the end with them
      for (int64_t j = n; j < i + Vec::W; ++j) y[j] = 0;
    sum = sum + load(y + i);
  }
  const Vec total = set1(reduce_add(sum));
  for (int64_t i = 0; i < n; i += Vec::W) store(y + i, load(y + i) / total);
}

// best[0 ... k) of values [begin, end), beside those that are there.
void choose(const float* values, int64_t begin, int64_t end, Best* best, int64_t k) {
  for (int64_t e = begin; e < end; ++e) insert(best, k, {values[e], e});
}

void choose_in_groups(const RouteExpertsParams& p, const float* values, Best* best) {
  const int64_t size = p.experts / p.groups;
  Best top[kMaxExperts];
  bool inside[kMaxExperts] = {};
  for (int64_t g = 0; g < p.top_groups; ++g) top[g] = kNone;
  for (int64_t g = 0; g < p.groups; ++g) {
    Best two[2] = {kNone, kNone};
    choose(values, g * size, (g + 1) * size, two, p.group_best);
    insert(top, p.top_groups, {p.group_best == 1 ? two[0].value : two[0].value + two[1].value, g});
  }
  for (int64_t g = 0; g < p.top_groups; ++g) inside[top[g].index] = true;
  for (int64_t g = 0; g < p.groups; ++g)
    if (inside[g]) choose(values, g * size, (g + 1) * size, best, p.k);
}

template <class T>
void route_row(const RouteExpertsParams& p, int64_t row) {
  alignas(64) float x[kMaxExperts + Vec::W], scores[kMaxExperts + Vec::W], values[kMaxExperts + Vec::W];
  alignas(64) float weights[kMaxChosen + Vec::W];
  const T* logits = static_cast<const T*>(p.logits.data) + row * p.logits.stride;
  const auto score = [&](const float* of, int64_t n, float* to) {
    p.sigmoid ? sigmoid(of, n, to) : softmax(of, n, to);
  };
  for (int64_t e = 0; e < p.experts; e += Vec::W) store(x + e, load_n(logits + e, int(p.experts - e)));
  for (int64_t e = p.experts; e % Vec::W; ++e) x[e] = -INFINITY;
  const bool sums = p.top_groups < p.groups && p.group_best > 1;
  const float* choice = x;
  if (p.bias || sums || (!p.sigmoid && !p.normalize)) score(x, p.experts, scores);
  if (p.bias || sums) {
    choice = values;
    for (int64_t e = 0; e < p.experts; ++e) values[e] = p.bias ? scores[e] + p.bias[e] : scores[e];
  }
  Best best[kMaxChosen];
  for (int64_t i = 0; i < p.k; ++i) best[i] = kNone;
  if (p.top_groups < p.groups) choose_in_groups(p, choice, best);
  else choose(choice, 0, p.experts, best, p.k);
  // What of the scores is left: of a normalized softmax, that of the chosen logits.
  const bool whole = !p.sigmoid && !p.normalize;
  for (int64_t i = 0; i < p.k; ++i) weights[i] = (whole ? scores : x)[best[i].index];
  for (int64_t i = p.k; i % Vec::W; ++i) weights[i] = -INFINITY;
  if (!whole) score(weights, p.k, weights);
  float total = 1;
  if (p.sigmoid && p.normalize) {
    total = 0;
    for (int64_t i = 0; i < p.k; ++i) total += weights[i];
    total += kTiny;
  }
  for (int64_t i = 0; i < p.k; ++i) {
    p.out_ids[row * p.k + i] = int32_t(best[i].index);
    p.out_weights[row * p.k + i] = weights[i] / total * p.scale;
  }
}

template <class T>
void run(const RouteExpertsParams& p) {
  parallel_for(p.rows, 1 + kGrainElements / p.experts, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) route_row<T>(p, row);
  });
}

}  // namespace

void route_experts(const RouteExpertsParams& p) {
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
