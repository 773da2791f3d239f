#include "cpu/verify.h"

#include "cpu/argmax.h"
#include "cpu/drafted.h"
#include "cpu/parallel.h"

namespace dflash::DFLASH_ISA {
namespace {

// target(b, i) is asked only up to the first mismatch, in order.
template <class Target>
void verify_request(const VerifyGreedyParams& p, int64_t b, const Target& target) {
  const int64_t width = width_of(p, b);
  const int64_t* draft = p.draft_ids + b * p.draft_stride;
  int64_t* tokens = p.tokens + b * p.tokens_stride;
  int64_t commit = 0, last = -1;
  while (commit < width) {
    last = target(b, commit);
    tokens[commit++] = last;
    if (commit == width || draft[commit] != last || last < 0) break;
  }
  commit_block(p, b, commit, last);
}

template <class T>
int64_t argmax_row(const VerifyGreedyParams& p, int64_t b, int64_t i) {
  return argmax(static_cast<const T*>(p.logits) + b * p.logits_outer_stride + i * p.logits_stride, p.vocab);
}

// Enough requests share out the threads. Otherwise a request's rows do, one row a thread at a time, so that the rows
// that no one needs (after the first mismatch) are mostly not read; `tokens` holds the answers meanwhile.
template <class T>
void run_logits(const VerifyGreedyParams& p) {
  const int64_t threads = num_threads();
  if (p.requests >= threads) {
    parallel_for(p.requests, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        verify_request(p, b, [&](int64_t r, int64_t i) { return argmax_row<T>(p, r, i); });
    });
    return;
  }
  for (int64_t b = 0; b < p.requests; ++b)
    verify_request(p, b, [&](int64_t r, int64_t i) {
      int64_t* tokens = p.tokens + r * p.tokens_stride;
      if (i % threads == 0) {
        const int64_t left = width_of(p, r) - i;
        parallel_for(left < threads ? left : threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t j = i + begin; j < i + end; ++j) tokens[j] = argmax_row<T>(p, r, j);
        });
      }
      return tokens[i];
    });
}

}  // namespace

void verify_greedy(const VerifyGreedyParams& p) {
  if (p.target_ids) {
    parallel_for(p.requests, 256, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        verify_request(p, b, [&](int64_t r, int64_t i) { return p.target_ids[r * p.target_stride + i]; });
    });
    return;
  }
  switch (p.dtype) {
    case Dtype::f32: return run_logits<float>(p);
    case Dtype::bf16: return run_logits<bf16>(p);
    case Dtype::f16: return run_logits<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
