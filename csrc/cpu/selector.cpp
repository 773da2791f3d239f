// select_candidates: a slot reads K rows of the successor codebook, one of the other and one of hidden if there is one,
// of R elements: e * (K + 2) * R bytes, 8.7 KiB for 16 candidates and 256 bfloat16 numbers. That is 2 K R operations,
// and a small part of what the head reads for the slot's candidates; the floor is the bytes over the bandwidth of
// memory, or one read from memory a slot, as a slot's row of the predecessor codebook is known when the slot before it
// is decided.
//
// Candidates are known from the start, so their rows are asked for a slot ahead. Requests share out the threads. A sum
// goes over r in vectors, each candidate by itself, so that a request's bits are its own.
#include "cpu/selector.h"

#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/sample_draw.h"

namespace dflash::DFLASH_ISA {
namespace {

constexpr int kTogether = 4;  // candidates that share a load of the step

template <class T>
class Walk {
 public:
  Walk(const SelectCandidatesParams& p, int64_t request, float* memory)
      : p_(p), b_(request), step_(memory), scores_(step_ + steps(p)) {}

  static int64_t steps(const SelectCandidatesParams& p) { return ceil_div(p.rank, Vec::W) * Vec::W; }
  static size_t bytes(const SelectCandidatesParams& p) {
    return (steps(p) + p.candidates) * sizeof(float);
  }

  void run() {
    int64_t before = p_.anchors[b_ * p_.anchor_stride];
    ask(0);
    for (int64_t slot = 0; slot < p_.slots; ++slot) {
      ask(slot + 1);
      take_step(before, slot);
      score(slot);
      before = ids(slot)[choose(slot)];
      prefetch_row(row(p_.predecessor, before));
      p_.out_ids[b_ * p_.out_stride + slot] = before;
    }
  }

 private:
  int64_t at(int64_t slot) const { return b_ * p_.slots + slot; }
  const int64_t* ids(int64_t slot) const { return p_.ids + at(slot) * p_.candidates; }
  // Null for a token without one, which counts as zeros.
  const T* row(const void* table, int64_t id) const {
    return id >= 0 && id < p_.vocab ? static_cast<const T*>(table) + id * p_.rank : nullptr;
  }
  void prefetch_row(const T* x) const {
    if (!x) return;
    for (int64_t i = 0; i < p_.rank; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i);
  }
  void ask(int64_t slot) const {
    if (slot >= p_.slots) return;
    for (int64_t c = 0; c < p_.candidates; ++c) prefetch_row(row(p_.successor, ids(slot)[c]));
  }

  // What the slot's rows of the successor codebook are multiplied with.
  void take_step(int64_t before, int64_t slot) {
    const T* x = row(p_.predecessor, before);
    const T* hidden = p_.hidden ? static_cast<const T*>(p_.hidden) + at(slot) * p_.rank : nullptr;
    for (int64_t i = 0; i < p_.rank; i += Vec::W) {
      const int n = int(p_.rank - i);
      Vec step = x ? load_n(x + i, n) : set1(0.0f);
      if (x && hidden) step = rounded<T>(step * load_n(hidden + i, n));
      store(step_ + i, step);
    }
  }

  void score(int64_t slot) {
    const float* values = p_.values + at(slot) * p_.candidates;
    for (int64_t first = 0; first < p_.candidates; first += kTogether) {
      const T* rows[kTogether];
      Vec sums[kTogether];
      for (int j = 0; j < kTogether; ++j) {
        rows[j] = first + j < p_.candidates ? row(p_.successor, ids(slot)[first + j]) : nullptr;
        sums[j] = set1(0.0f);
      }
      for (int64_t i = 0; i < p_.rank; i += Vec::W) {
        const Vec step = load(step_ + i);
        for (int j = 0; j < kTogether; ++j)
          if (rows[j]) sums[j] = fma(step, load_n(rows[j] + i, int(p_.rank - i)), sums[j]);
      }
      for (int j = 0; j < kTogether && first + j < p_.candidates; ++j)
        scores_[first + j] = values[first + j] + to_float(from_float<T>(reduce_add(sums[j])));
    }
  }

  // The place of the slot's draft among its candidates.
  int64_t choose(int64_t slot) {
    const Row row{scores_, Dtype::f32, p_.candidates, nullptr, 1.0f, nullptr, nullptr};
    int64_t place = -1;
    if (p_.out_probs) {
      float *probs = p_.out_probs + at(slot) * p_.candidates, top, mass;
      const Filters filters = filters_of(p_.sampling, b_);
      const Distribution distribution = double(filters.temperature) < kGreedy
                                            ? Distribution{1.0, argmax_of(row), 0.0f, 0.0f, 0.0f, 0.0f}
                                            : distribution_of(row, filters, &top, &mass);
      const int64_t start = p_.context_lens[b_];
      place = draw(row, distribution, &top, &mass,
                   uniform(p_.sampling.seeds[b_], start + 1 + slot, Purpose::draft, start));
      for (int64_t c = 0; c < p_.candidates; ++c) probs[c] = float(mass_at(row, distribution, &top, c));
    } else {
      place = argmax_of(row);
    }
    p_.out_logprobs[at(slot)] = log_share(place);
    return place;
  }

  float log_share(int64_t place) const {
    float top = scores_[0];
    for (int64_t c = 1; c < p_.candidates; ++c) top = scores_[c] > top ? scores_[c] : top;
    Vec sum = set1(0.0f);
    for (int64_t c = 0; c < p_.candidates; c += Vec::W) {
      float lanes[Vec::W];
      for (int l = 0; l < Vec::W; ++l) lanes[l] = c + l < p_.candidates ? scores_[c + l] - top : -INFINITY;
      sum = sum + vexp(load(lanes));
    }
    return float(double(scores_[place]) - double(top) - std::log(double(reduce_add(sum))));
  }

  const SelectCandidatesParams& p_;
  const int64_t b_;
  float *step_, *scores_;
};

template <class T>
void run(const SelectCandidatesParams& p) {
  const int64_t grain = 1 + 32768 / (p.slots * p.candidates * p.rank + 1);
  parallel_for(p.requests, grain, [&](int64_t begin, int64_t end) {
    static thread_local ThreadMemory memory;
    float* mine = static_cast<float*>(memory.get(Walk<T>::bytes(p)));
    for (int64_t b = begin; b < end; ++b) Walk<T>(p, b, mine).run();
  });
}

}  // namespace

void select_candidates(const SelectCandidatesParams& p) {
  static_assert(kChunk >= 64, "the candidates of a slot are one chunk of a row");
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p);
    case Dtype::bf16: return run<bf16>(p);
    case Dtype::f16: return run<f16>(p);
  }
}

}  // namespace dflash::DFLASH_ISA
