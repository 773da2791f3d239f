#include "cpu/selector.h"

#include "bindings/host.h"

namespace dflash {
namespace {

using Maybe = std::optional<Tensor>;

void select_candidates(const Tensor& values, const Tensor& ids, const Maybe& hidden, const Tensor& anchor_ids,
                       const Tensor& predecessor, const Tensor& successor, const Tensor& context_lens,
                       const Maybe& temperature, const Maybe& seeds, const Maybe& top_k, const Maybe& top_p,
                       const Maybe& min_p, const Tensor& out_ids, const Tensor& out_logprobs, const Maybe& out_probs) {
  SelectCandidatesParams p{};
  p.values = data<const float>(values);
  p.ids = data<const int64_t>(ids);
  p.hidden = hidden ? hidden->data_ptr() : nullptr;
  p.anchors = data<const int64_t>(anchor_ids);
  p.anchor_stride = anchor_ids.stride(0);
  p.predecessor = predecessor.data_ptr();
  p.successor = successor.data_ptr();
  p.context_lens = data<const int32_t>(context_lens);
  p.sampling = {data<const float>(temperature), data<const int64_t>(seeds), data<const int32_t>(top_k),
                data<const float>(top_p), data<const float>(min_p)};
  p.out_ids = data<int64_t>(out_ids);
  p.out_stride = out_ids.stride(0);
  p.out_logprobs = data<float>(out_logprobs);
  p.out_probs = data<float>(out_probs);
  p.requests = values.size(0);
  p.slots = values.size(1);
  p.candidates = values.size(2);
  p.rank = predecessor.size(1);
  p.vocab = predecessor.size(0);
  p.dtype = dtype_of(predecessor, "select_candidates: predecessor");
  launch(select_candidates_kernels, p,
         {values, ids, hidden, anchor_ids, predecessor, successor, context_lens, temperature, seeds, top_k, top_p,
          min_p, out_ids, out_logprobs, out_probs});
}

DFLASH_CPU_OPS(m) { m.impl("select_candidates", TORCH_BOX(&select_candidates)); }

}  // namespace
}  // namespace dflash
