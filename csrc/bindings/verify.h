// What the bindings of every verification share.
#pragma once

#include "bindings/host.h"
#include "cpu/verify.h"

namespace dflash {

inline DraftedBlocks drafted_blocks(const Tensor& draft_ids, const Tensor& context_lens,
                                    const std::optional<Tensor>& block_lens, const Tensor& accept_lens,
                                    const Tensor& commit_lens, const Tensor& tokens, const Tensor& bonus,
                                    const Tensor& new_lens) {
  return {data<const int64_t>(draft_ids), draft_ids.stride(0),        data<const int32_t>(context_lens),
          data<const int32_t>(block_lens), data<int32_t>(accept_lens), data<int32_t>(commit_lens),
          data<int64_t>(tokens),           tokens.stride(0),           data<int64_t>(bonus),
          data<int32_t>(new_lens),         draft_ids.size(0),          draft_ids.size(1)};
}

}  // namespace dflash
