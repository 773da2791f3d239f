#include "cpu/sample.h"

#include "bindings/verify.h"

namespace dflash {
namespace {

using Maybe = std::optional<Tensor>;

Blocks blocks(const Maybe& t) {
  return t ? Blocks{t->data_ptr(), t->stride(0), t->stride(1)} : Blocks{};
}

SamplingRecord record(const Tensor& temperature, const Tensor& seeds, const Maybe& top_k, const Maybe& top_p,
                      const Maybe& min_p) {
  return {data<const float>(temperature), data<const int64_t>(seeds), data<const int32_t>(top_k),
          data<const float>(top_p), data<const float>(min_p)};
}

void verify_sample(const Tensor& draft_ids, const Tensor& logits, const Tensor& context_lens, const Tensor& temperature,
                   const Tensor& seeds, const Maybe& top_k, const Maybe& top_p, const Maybe& min_p,
                   const Maybe& draft_probs, const Maybe& draft_candidates, const Maybe& draft_logits,
                   const Maybe& seen, const Maybe& repetition_penalty, const Maybe& bias, const Maybe& bitmask,
                   const Maybe& block_lens, bool block_rule, const Tensor& accept_lens, const Tensor& commit_lens,
                   const Tensor& tokens, const Tensor& bonus, const Tensor& new_lens, const Tensor& workspace) {
  VerifySampleParams p{drafted_blocks(draft_ids, context_lens, block_lens, accept_lens, commit_lens, tokens, bonus,
                                     new_lens)};
  p.logits = blocks(logits);
  p.dtype = dtype_of(logits, "verify_sample: logits");
  p.vocab = logits.size(2);
  p.sampling = record(temperature, seeds, top_k, top_p, min_p);
  p.draft_probs = blocks(draft_probs);
  p.draft_candidates = blocks(draft_candidates);
  p.candidates = draft_candidates ? draft_candidates->size(2) : 0;
  p.draft_logits = blocks(draft_logits);
  if (draft_logits) p.draft_dtype = dtype_of(*draft_logits, "verify_sample: proposal.logits");
  p.seen = blocks(seen);
  p.repetition_penalty = data<const float>(repetition_penalty);
  p.bias = blocks(bias);
  p.bitmask = blocks(bitmask);
  p.block_rule = block_rule;
  p.workspace = data<float>(workspace);
  launch(verify_sample_kernels, p,
         {draft_ids, logits, context_lens, temperature, seeds, top_k, top_p, min_p, draft_probs, draft_candidates,
          draft_logits, seen, repetition_penalty, bias, bitmask, block_lens, accept_lens, commit_lens, tokens, bonus,
          new_lens, workspace});
}

void sample_draft(const Tensor& values, const Tensor& ids, const Tensor& context_lens, const Tensor& temperature,
                  const Tensor& seeds, const Maybe& top_k, const Maybe& top_p, const Maybe& min_p,
                  const Tensor& out_ids, const Tensor& out_probs) {
  SampleDraftParams p{};
  p.values = data<const float>(values);
  p.ids = data<const int64_t>(ids);
  p.context_lens = data<const int32_t>(context_lens);
  p.sampling = record(temperature, seeds, top_k, top_p, min_p);
  p.out_ids = data<int64_t>(out_ids);
  p.out_stride = out_ids.stride(0);
  p.out_probs = data<float>(out_probs);
  p.requests = values.size(0);
  p.slots = values.size(1);
  p.candidates = values.size(2);
  launch(sample_draft_kernels, p,
         {values, ids, context_lens, temperature, seeds, top_k, top_p, min_p, out_ids, out_probs});
}

DFLASH_CPU_OPS(m) {
  m.impl("verify_sample", TORCH_BOX(&verify_sample));
  m.impl("sample_draft", TORCH_BOX(&sample_draft));
}

}  // namespace
}  // namespace dflash
