// Drawing: a token from a row's distribution, or from what the distribution has over the proposal that a draft came
// from.
#pragma once

#include "cpu/sample_distribution.h"

namespace dflash::DFLASH_ISA {
namespace {

inline double mass_at(const Row& row, const Distribution& distribution, const float* tops, int64_t token) {
  if (distribution.fixed >= 0) return token == distribution.fixed ? 1.0 : 0.0;
  const float top = tops[token / kChunk];
  if (top == -INFINITY) return 0.0;
  float weight[Vec::W];
  store(weight, Weigher(distribution, top)(set1(value_at(row, token))));
  return weight[0] * distribution.scale(top) / distribution.total;
}

// The first chunk that brings the running sum of masses above `goal`, and what is left of the goal there. Where
// rounding leaves none, the last one that has any.
inline int64_t find_chunk(const float* masses, int64_t chunks, double goal, double* rest) {
  double sum = 0.0;
  int64_t last = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    if (!(masses[c] > 0.0f)) continue;
    *rest = goal - sum;
    last = c;
    sum += masses[c];
    if (sum > goal) break;
  }
  return last;
}

inline int64_t find_token(const float* weights, int n, double goal) {
  double sum = 0.0;
  int64_t last = 0;
  for (int i = 0; i < n; ++i) {
    if (!(weights[i] > 0.0f)) continue;
    last = i;
    sum += weights[i];
    if (sum > goal) break;
  }
  return last;
}

// The first token with a cumulative mass above u times the total.
inline int64_t draw(const Row& row, const Distribution& distribution, const float* tops, const float* masses,
                    double u) {
  if (distribution.fixed >= 0) return distribution.fixed;
  double rest = 0.0;
  const int64_t c = find_chunk(masses, row.chunks(), u * distribution.total, &rest);
  int64_t token = 0;
  with_chunk(row, c, [&](const auto* x, int n, int64_t first) {
    alignas(64) float weights[kChunk];
    const Weigher weigh(distribution, tops[c]);
    for (int i = 0; i < n; i += Vec::W) store(weights + i, weigh(load(x + i)));
    token = first + find_token(weights, n, rest / distribution.scale(tops[c]));
  });
  return token;
}

// The distribution q of one slot's draft in one of the forms it comes in; `probs` alone is dense.
struct Drafted {
  const float* probs;
  const int64_t* ids;
  int64_t candidates, vocab;
  Row row;  // row.x null: not logits
  Distribution distribution;
  const float* tops;

  double at(int64_t token) const {
    if (row.x) return mass_at(row, distribution, tops, token);
    if (!ids) return probs[token];
    double sum = 0.0;
    for (int64_t k = 0; k < candidates; ++k)
      if (ids[k] == token) sum += probs[k];
    return sum;
  }

  // q of the n tokens of chunk c, zero beyond the vocabulary; false where there is none, and then nothing is written.
  bool fill(int64_t c, int n, float* q) const {
    const int64_t first = c * kChunk;
    if (row.x && distribution.fixed < 0) {
      const float factor = float(distribution.scale(tops[c]) / distribution.total);
      if (tops[c] == -INFINITY || factor == 0.0f) return false;
      const Weigher weigh(distribution, tops[c]);
      with_chunk(row, c, [&](const auto* x, int, int64_t) {
        for (int i = 0; i < n; i += Vec::W) store(q + i, weigh(load(x + i)) * set1(factor));
      });
      return true;
    }
    if (!row.x && !ids) {
      const int inside = int(vocab - first < n ? vocab - first : n);
      std::memcpy(q, probs + first, sizeof(float) * inside);
      for (int i = inside; i < n; ++i) q[i] = 0.0f;
      return true;
    }
    const int64_t* held = row.x ? &distribution.fixed : ids;
    bool any = false;
    for (int64_t k = 0; k < (row.x ? 1 : candidates); ++k) {
      if (held[k] < first || held[k] >= first + n || held[k] >= vocab) continue;
      for (int i = 0; !any && i < n; ++i) q[i] = 0.0f;
      any = true;
      q[held[k] - first] += row.x ? 1.0f : probs[k];
    }
    return any;
  }
};

// (share * p - q)+ of a row, chunk by chunk.
struct Residual {
  const Row& row;
  const Distribution& distribution;
  const float *tops, *masses;
  const Drafted& q;
  double share;

  void fill(int64_t c, float* out, int* count) const {
    alignas(64) float drafted[kChunk];
    const Vec factor = set1(float(share * distribution.scale(tops[c]) / distribution.total)), zero = set1(0.0f);
    with_chunk(row, c, [&](const auto* x, int n, int64_t) {
      const Weigher weigh(distribution, tops[c]);
      const bool any = q.fill(c, n, drafted);
      for (int i = 0; i < n; i += Vec::W) {
        const Vec p = weigh(load(x + i)) * factor;
        store(out + i, any ? vmax(p - load(drafted + i), zero) : p);
      }
      *count = n;
    });
  }

  // Their sum; rest takes each chunk's.
  double measure(float* rest) const {
    if (distribution.fixed >= 0) {
      const double left = share - q.at(distribution.fixed);
      return left > 0.0 ? left : 0.0;
    }
    double total = 0.0;
    for (int64_t c = 0; c < row.chunks(); ++c) {
      rest[c] = 0.0f;
      if (!(masses[c] > 0.0f)) continue;
      alignas(64) float left[kChunk];
      int n = 0;
      fill(c, left, &n);
      Vec sum = set1(0.0f);
      for (int i = 0; i < n; i += Vec::W) sum = sum + load(left + i);
      rest[c] = reduce_add(sum);
      total += rest[c];
    }
    return total;
  }

  int64_t draw(const float* rest, double total, double u) const {
    if (distribution.fixed >= 0) return distribution.fixed;
    double goal = 0.0;
    const int64_t c = find_chunk(rest, row.chunks(), u * total, &goal);
    alignas(64) float left[kChunk];
    int n = 0;
    fill(c, left, &n);
    return c * kChunk + find_token(left, n, goal);
  }
};

}  // namespace
}  // namespace dflash::DFLASH_ISA
