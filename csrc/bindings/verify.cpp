#include "bindings/verify.h"

namespace dflash {
namespace {

using Maybe = std::optional<Tensor>;

void verify_greedy(const Tensor& draft_ids, const Maybe& target_ids, const Maybe& logits, const Tensor& context_lens,
                   const Maybe& block_lens, const Tensor& accept_lens, const Tensor& commit_lens, const Tensor& tokens,
                   const Tensor& bonus, const Tensor& new_lens) {
  VerifyGreedyParams p{drafted_blocks(draft_ids, context_lens, block_lens, accept_lens, commit_lens, tokens, bonus,
                                     new_lens)};
  if (target_ids) {
    p.target_ids = data<const int64_t>(target_ids);
    p.target_stride = target_ids->stride(0);
  } else {
    p.logits = logits->data_ptr();
    p.logits_outer_stride = logits->stride(0);
    p.logits_stride = logits->stride(1);
    p.vocab = logits->size(2);
    p.dtype = dtype_of(*logits, "verify_greedy: logits");
  }
  launch(verify_greedy_kernels, p,
         {draft_ids, target_ids, logits, context_lens, block_lens, accept_lens, commit_lens, tokens, bonus, new_lens});
}

DFLASH_CPU_OPS(m) { m.impl("verify_greedy", TORCH_BOX(&verify_greedy)); }

}  // namespace
}  // namespace dflash
