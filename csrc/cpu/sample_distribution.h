// The distribution that one row of logits gives its token: a floor below which nothing is drawn, and the mass above it.
//
// Memory is read once, for the chunks' maxima and sums. What follows looks again only at chunks that can matter, while
// they are in the cache: filters are thresholds on the logit, and a threshold is found by counting, or weighing, in
// bins of order-preserving keys that narrow from level to level. Sums go by a token's index and by nothing else.
#pragma once

#include "cpu/sample_row.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr double kGreedy = 1e-5;  // temperatures below are 0; as in dflash_kernels/_constants.py
constexpr float kHottest = 1e37;  // an infinite temperature must not make NaN of -inf

struct Filters {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
};

// What is off is 0, 1 and 0.
inline Filters filters_of(const SamplingRecord& s, int64_t b) {
  const float temp = s.temperature[b] > kHottest ? kHottest : s.temperature[b];
  return {temp, s.top_k ? s.top_k[b] : 0, s.top_p ? s.top_p[b] : 1.0f, s.min_p ? s.min_p[b] : 0.0f};
}

// A token v of chunk c has mass exp((x_v - tops[c]) / temperature) * scale(c), if x_v is at least `floor`.
struct Distribution {
  double total;
  int64_t fixed;  // the one token that has everything, or -1
  float top, floor;
  float temperature, inverse;

  double scale(float chunk_top) const {
    return chunk_top == top ? 1.0 : std::exp((double(chunk_top) - double(top)) / double(temperature));
  }
};
static_assert(2 * sizeof(Distribution) == kRowStats * sizeof(float), "two of them are a row's header in the workspace");

// The weight of logits against the largest of their chunk, or of the row. Where that is +inf, it takes all.
struct Weigher {
  Vec top, inverse, floor;
  bool infinite;

  Weigher(const Distribution& distribution, float against)
      : top(set1(against)), inverse(set1(distribution.inverse)), floor(set1(distribution.floor)),
        infinite(against == INFINITY) {}
  Vec operator()(Vec x) const {
    const Vec clean = vmax(x, set1(-INFINITY));
    const Vec w = infinite ? select_lt(clean, top, set1(0.0f), set1(1.0f)) : vexp_negative((x - top) * inverse);
    return select_lt(x, floor, set1(0.0f), w);
  }
};

template <class T>
float top_of(const T* x, int n) {
  Vec best[4];
  for (Vec& v : best) v = set1(-INFINITY);
  int i = 0;
  for (; i + 4 * Vec::W <= n; i += 4 * Vec::W)
    for (int k = 0; k < 4; ++k) best[k] = vmax(load(x + i + k * Vec::W), best[k]);  // keeps best where x is NaN
  for (; i < n; i += Vec::W) best[0] = vmax(load(x + i), best[0]);
  float lanes[Vec::W], top = -INFINITY;
  store(lanes, vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
  for (float lane : lanes) top = lane > top ? lane : top;
  return top;
}

template <class T>
float sum_of(const T* x, int n, const Weigher& weigh) {
  Vec sums[4];
  for (Vec& v : sums) v = set1(0.0f);
  int i = 0;
  for (; i + 4 * Vec::W <= n; i += 4 * Vec::W)
    for (int k = 0; k < 4; ++k) sums[k] = sums[k] + weigh(load(x + i + k * Vec::W));
  for (; i < n; i += Vec::W) sums[0] = sums[0] + weigh(load(x + i));
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// masses[c] = mass of each chunk above the distribution's floor, from sums that were taken already or from another
// look.
inline void weigh_chunks(const Row& row, Distribution& distribution, const float* tops, float* masses, bool summed) {
  distribution.total = 0.0;
  for (int64_t c = 0; c < row.chunks(); ++c) {
    if (tops[c] < distribution.floor || tops[c] == -INFINITY) {
      masses[c] = 0.0f;
      continue;
    }
    if (!summed)
      with_chunk(row, c,
                 [&](const auto* x, int n, int64_t) { masses[c] = sum_of(x, n, Weigher(distribution, tops[c])); });
    masses[c] = float(masses[c] * distribution.scale(tops[c]));
    distribution.total += masses[c];
  }
}

// ---- thresholds ----------------------------------------------------------------------------------------------------

// Keys have the order of their floats; -0 must have become +0.
inline uint32_t key_of(float x) {
  const uint32_t u = float_to_bits(x);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
inline float value_of(uint32_t key) { return bits_to_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

constexpr int kBinBits = 11, kFewBinBits = 7;

// Keys from low to high in at most 2^bits bins of 2^shift keys each. A short row is better looked at once more than
// given many bins.
struct Range {
  uint32_t low, high;
  int bits, shift;

  Range(int64_t size, uint32_t from, uint32_t to)
      : low(from), high(to), bits(size > kChunk ? kBinBits : kFewBinBits), shift(0) {
    while ((high - low) >> shift >> bits) ++shift;
  }
};

template <bool Mass>
void fill_bins(const Row& row, const float* tops, const Range& range, const Weigher& weigh, double* bins) {
  const float low = value_of(range.low), high = value_of(range.high);
  for (int i = 0; i < 1 << range.bits; ++i) bins[i] = 0.0;
  for (int64_t c = 0; c < row.chunks(); ++c) {
    if (tops && tops[c] < low) continue;
    with_chunk(row, c, [&](const auto* x, int n, int64_t) {
      float value[Vec::W], weight[Vec::W];
      for (int i = 0; i < n; i += Vec::W) {
        const Vec v = load(x + i) + set1(0.0f);  // -0 + 0 is +0
        if (!any_at_least(v, set1(low))) continue;
        store(value, v);
        if (Mass) store(weight, weigh(v));
        for (int l = 0; l < Vec::W; ++l)
          if (value[l] >= low && value[l] <= high)
            bins[(key_of(value[l]) - range.low) >> range.shift] += Mass ? weight[l] : 1.0;
      }
    });
  }
}

// The smallest value v >= low such that what is larger than v, up to `high`, is less than `goal` tokens; by mass, less
// than `goal` of mass in units of the row's largest weight. goal < 0: that share, negated, of all from low to high.
template <bool Mass>
float threshold(const Row& row, const float* tops, const Distribution& distribution, float low, float high,
                double goal) {
  alignas(64) double bins[1 << kBinBits];
  Range range(row.size, key_of(low + 0.0f), key_of(high + 0.0f));
  for (double above = 0.0;;) {
    fill_bins<Mass>(row, tops, range, Weigher(distribution, distribution.top), bins);
    int64_t b = (range.high - range.low) >> range.shift;
    if (goal < 0.0) {
      double all = 0.0;
      for (int64_t i = b; i >= 0; --i) all += bins[i];
      goal = -goal * all;
    }
    for (; b >= 0 && above + bins[b] < goal; --b) above += bins[b];
    if (b < 0) return value_of(range.low);
    if (range.shift == 0) return value_of(range.low + uint32_t(b));
    const uint32_t from = range.low + (uint32_t(b) << range.shift), last = from + ((1u << range.shift) - 1);
    range = Range(row.size, from, last < range.high ? last : range.high);
  }
}

// Below the k-th largest of the chunks' maxima there are no k largest tokens.
inline float top_k_floor(const Row& row, const float* tops, const Distribution& distribution, int64_t k) {
  float low = distribution.floor;
  if (k <= row.chunks()) {
    const Row maxima{tops, Dtype::f32, row.chunks(), nullptr, 0.0f, nullptr, nullptr};
    const float found = threshold<false>(maxima, nullptr, distribution, low, distribution.top, double(k));
    low = found > low ? found : low;
  }
  return threshold<false>(row, tops, distribution, low, distribution.top, double(k));
}

inline float min_p_floor(const Distribution& distribution, float min_p) {
  if (min_p >= 1.0f) return distribution.top;
  const double exact = double(distribution.top) + double(distribution.temperature) * std::log(double(min_p));
  const float near = float(exact);
  return double(near) < exact ? value_of(key_of(near) + 1) : near;
}

// The smallest tokens whose weights cannot add up to 1 - p of the whole are dropped unseen; half of that, for rounding.
inline float top_p_low(const Row& row, const Distribution& distribution, float top_p) {
  const double weight = (1.0 - double(top_p)) * distribution.total / (2.0 * double(row.size));
  return float(double(distribution.top) + double(distribution.temperature) * std::log(weight));
}

// Fills tops and masses, one a chunk. The row must not be greedy.
inline Distribution distribution_of(const Row& row, const Filters& f, float* tops, float* masses) {
  const bool by_count = f.top_k > 0 && f.top_k < row.size, by_mass = f.top_p < 1.0f, by_share = f.min_p > 0.0f;
  const bool sum = !by_count && !by_share;
  Distribution distribution{0.0, -1, -INFINITY, -INFINITY, f.temperature, 1.0f / f.temperature};
  for (int64_t c = 0; c < row.chunks(); ++c) {
    prefetch_chunk(row, c + 2);
    with_chunk(row, c, [&](const auto* x, int n, int64_t) {
      tops[c] = top_of(x, n);
      if (sum && tops[c] > -INFINITY) masses[c] = sum_of(x, n, Weigher(distribution, tops[c]));
      distribution.top = tops[c] > distribution.top ? tops[c] : distribution.top;
    });
  }
  if (distribution.top == -INFINITY) {
    distribution.fixed = argmax_of(row);
    return distribution;
  }
  if (sum) weigh_chunks(row, distribution, tops, masses, true);
  if (distribution.top == INFINITY || (sum && !by_mass)) {
    if (!sum) weigh_chunks(row, distribution, tops, masses, false);
    return distribution;
  }
  if (by_share) distribution.floor = min_p_floor(distribution, f.min_p);
  if (by_count) distribution.floor = top_k_floor(row, tops, distribution, f.top_k);
  if (by_mass) {
    const double share = f.top_p > 0.0f ? double(f.top_p) : 0.0;
    const float low = sum ? top_p_low(row, distribution, f.top_p) : distribution.floor;
    distribution.floor = share == 0.0 ? distribution.top
                                      : threshold<true>(row, tops, distribution, low, distribution.top,
                                                        sum ? share * distribution.total : -share);
  }
  weigh_chunks(row, distribution, tops, masses, false);
  return distribution;
}

}  // namespace
}  // namespace dflash::DFLASH_ISA
