#include "cpu/sample.h"

#include "cpu/drafted.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/sample_draw.h"

namespace dflash::DFLASH_ISA {
namespace {

const void* at(const Blocks& t, int64_t itemsize, int64_t b, int64_t i) {
  return t.data ? static_cast<const char*>(t.data) + (b * t.outer + i * t.inner) * itemsize : nullptr;
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// What is known of one row of one request, in the workspace.
struct Ready {
  Distribution distribution, drafted;
  float *tops, *masses, *drafted_tops, *rest;
};

// Live tokens of a block, which ends at its first draft that is no token: nothing was proposed there.
int64_t proposed_width(const VerifySampleParams& p, int64_t b) {
  const int64_t width = width_of(p, b);
  const int64_t* block = p.draft_ids + b * p.draft_stride;
  for (int64_t i = 1; i < width; ++i)
    if (block[i] < 0 || block[i] >= p.vocab) return i;
  return width;
}

struct Request {
  const VerifySampleParams& p;
  int64_t b, width, threads;
  Filters filters;

  Request(const VerifySampleParams& params, int64_t request, int64_t together)
      : p(params), b(request), width(proposed_width(params, request)), threads(together),
        filters(filters_of(params.sampling, request)) {}

  bool greedy() const { return double(filters.temperature) < kGreedy; }
  bool one_hot() const { return greedy() || !(p.draft_probs.data || p.draft_logits.data); }
  int64_t draft(int64_t i) const { return p.draft_ids[b * p.draft_stride + i + 1]; }
  double u(int64_t i, Purpose purpose) const {
    const int64_t start = p.context_lens[b];
    return uniform(p.sampling.seeds[b], start + 1 + i, purpose, start);
  }

  Row row(int64_t i) const {
    return {at(p.logits, size_of(p.dtype), b, i), p.dtype, p.vocab,
            static_cast<const uint32_t*>(at(p.seen, 4, b, i)), p.repetition_penalty ? p.repetition_penalty[b] : 1.0f,
            static_cast<const float*>(at(p.bias, 4, b, i)), static_cast<const uint32_t*>(at(p.bitmask, 4, b, i))};
  }
  Row drafted_row(int64_t i) const {
    return {at(p.draft_logits, size_of(p.draft_dtype), b, i), p.draft_dtype, p.vocab, nullptr, 1.0f, nullptr, nullptr};
  }
  Drafted drafted(int64_t i, const Ready& ready) const {
    return {static_cast<const float*>(at(p.draft_probs, 4, b, i)),
            static_cast<const int64_t*>(at(p.draft_candidates, 8, b, i)), p.candidates, p.vocab, drafted_row(i),
            ready.drafted, ready.drafted_tops};
  }

  float* memory(int64_t i) const {
    const int64_t chunks = ceil_div(p.vocab, kChunk);
    return p.workspace + (b * p.block + i) * (kChunkSums * chunks + kRowStats);
  }
  Ready ready(int64_t i) const {
    Ready r;
    float* at = memory(i);
    const int64_t chunks = ceil_div(p.vocab, kChunk);
    std::memcpy(&r.distribution, at, 2 * sizeof(Distribution));
    r.tops = at + kRowStats;
    r.masses = r.tops + chunks;
    r.drafted_tops = r.masses + chunks;
    r.rest = r.drafted_tops + chunks;
    return r;
  }

  // The part of a row that needs no other row.
  void prepare(int64_t i) const {
    if (greedy()) {
      tokens()[i] = argmax_of(row(i));
      return;
    }
    Ready r = ready(i);
    r.distribution = distribution_of(row(i), filters, r.tops, r.masses);
    if (one_hot()) {
      tokens()[i] = draw(row(i), r.distribution, r.tops, r.masses, u(i, Purpose::sample));
      return;
    }
    if (p.draft_logits.data && i + 1 < width)
      r.drafted = distribution_of(drafted_row(i), {filters.temperature, 0, 1.0f, 0.0f}, r.drafted_tops, r.rest);
    std::memcpy(memory(i), &r.distribution, 2 * sizeof(Distribution));
  }

  // Prepares rows up to i, `threads` of them at a time, so that those that no one asks for are mostly not read.
  void need(int64_t i, int64_t& done) const {
    while (done <= i) {
      const int64_t count = width - done < threads ? width - done : threads;
      parallel_for(count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) prepare(done + j);
      });
      done += count;
    }
  }

  int64_t* tokens() const { return p.tokens + b * p.tokens_stride; }

  double residual(int64_t i, double share, int64_t* token) const {
    const Ready r = ready(i);
    const Row logits = row(i);
    const Drafted q = drafted(i, r);
    const Residual left{logits, r.distribution, r.tops, r.masses, q, share};
    const double total = left.measure(r.rest);
    if (token) *token = total > 0.0 ? left.draw(r.rest, total, u(i, Purpose::sample)) : own(i);
    return total;
  }
  int64_t own(int64_t i) const {
    const Ready r = ready(i);
    return draw(row(i), r.distribution, r.tops, r.masses, u(i, Purpose::sample));
  }

  int64_t by_answer(int64_t& last) const {
    int64_t done = 0, accept = 0;
    for (need(0, done); accept + 1 < width && draft(accept) == tokens()[accept]; need(++accept, done)) {
    }
    last = tokens()[accept];
    return accept;
  }

  int64_t by_token(int64_t& last) const {
    int64_t done = 0, i = 0;
    for (need(0, done); i + 1 < width; need(++i, done)) {
      const Ready r = ready(i);
      const double px = mass_at(row(i), r.distribution, r.tops, draft(i)), qx = drafted(i, r).at(draft(i));
      if (u(i, Purpose::accept) * qx < px) continue;
      residual(i, 1.0, &last);
      return i;
    }
    last = own(i);
    return i;
  }

  int64_t by_block(int64_t& last) const {
    int64_t done = 0, accept = 0;
    double kept = 1.0, share = 1.0;
    need(0, done);
    for (int64_t i = 1; i < width; ++i) {
      need(i - 1, done);
      const Ready r = ready(i - 1);
      const double px = mass_at(row(i - 1), r.distribution, r.tops, draft(i - 1)),
                   qx = drafted(i - 1, r).at(draft(i - 1));
      kept *= qx > 0.0 ? px / qx : px > 0.0 ? INFINITY : 0.0;
      if (!(kept > 0.0)) break;
      double odds = kept = kept < 1.0 ? kept : 1.0;
      if (i + 1 < width && kept < 1.0) {
        need(i, done);
        const double left = residual(i, kept, nullptr);
        odds = left / (left + 1.0 - kept);
      }
      if (u(i - 1, Purpose::accept) < odds) accept = i, share = kept;
    }
    need(accept, done);
    if (accept + 1 == width)
      last = own(accept);
    else
      residual(accept, share, &last);
    return accept;
  }

  void verify() const {
    int64_t accept = 0, commit = 0, last = -1;
    if (width > 0) {
      accept = one_hot() ? by_answer(last) : p.block_rule ? by_block(last) : by_token(last);
      commit = accept + 1;
      for (int64_t i = 0; i < accept; ++i) tokens()[i] = draft(i);
      tokens()[accept] = last;
    }
    commit_block(p, b, commit, last);
  }
};

thread_local ThreadMemory t_chunks;

}  // namespace

// Enough requests share out the threads. Otherwise a request's rows do.
void verify_sample(const VerifySampleParams& p) {
  const int64_t threads = num_threads();
  if (p.requests >= threads) {
    parallel_for(p.requests, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) Request(p, b, 1).verify();
    });
    return;
  }
  for (int64_t b = 0; b < p.requests; ++b) Request(p, b, threads).verify();
}

void sample_draft(const SampleDraftParams& p) {
  const int64_t k = p.candidates;
  parallel_for(p.requests * p.slots, 1 + 4096 / k, [&](int64_t begin, int64_t end) {
    float* tops = static_cast<float*>(t_chunks.get(sizeof(float) * 2 * ceil_div(k, kChunk)));
    float* masses = tops + ceil_div(k, kChunk);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / p.slots, slot = r % p.slots, start = p.context_lens[b];
      const Row row{p.values + r * k, Dtype::f32, k, nullptr, 1.0f, nullptr, nullptr};
      const Filters filters = filters_of(p.sampling, b);
      const bool greedy = double(filters.temperature) < kGreedy;
      const Distribution distribution = greedy ? Distribution{1.0, argmax_of(row), 0.0f, 0.0f, 0.0f, 0.0f}
                                               : distribution_of(row, filters, tops, masses);
      const double u = uniform(p.sampling.seeds[b], start + 1 + slot, Purpose::draft, start);
      const int64_t chosen = draw(row, distribution, tops, masses, u);
      p.out_ids[b * p.out_stride + slot] = p.ids[r * k + chosen];
      for (int64_t i = 0; i < k; ++i) p.out_probs[r * k + i] = float(mass_at(row, distribution, tops, i));
    }
  });
}

}  // namespace dflash::DFLASH_ISA
