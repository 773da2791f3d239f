"""_DflashDraftSampler -> lm_head_argmax: the draft head without logits, inside the captured draft graph.

With a vocabulary split over ranks, each rank finds its own winner here. The gathered values and their shapes are the
engine's.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from dflash_kernels import PackedWeight, lm_head_argmax, pack_weight

from ..hooks import LEFT, Hook, plan

LOG = logging.getLogger("sglang.dflash_kernels")


@dataclass(frozen=True)
class Plan:
    weight: PackedWeight


def decide(sampler: Any) -> Plan | str:
    """sampler: SGLang's _DflashDraftSampler."""
    weight = sampler.weight[: sampler.num_org]
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"a head of {weight.dtype}"
    return Plan(pack_weight(weight))


def winners(self, hidden_states, input_ids=None):
    """This rank's best id and logit for each row. It runs no collective, so that a failure can still fall back."""
    made = plan(self, "draft_head", decide, LOG)
    if (made is None or hidden_states.dim() != 2 or hidden_states.shape[1] != self.weight.shape[1]
            or hidden_states.shape[0] % self.block_size):
        return LEFT
    # The first row of a block is the anchor, which is known.
    rows = hidden_states.view(-1, self.block_size, hidden_states.shape[-1])[:, 1:].flatten(0, 1)
    return lm_head_argmax(rows.to(self.weight.dtype), made.weight, id_offset=self.org_vocab_start)


def choose(found, self, hidden_states, input_ids=None):
    ids, values = found
    n = ids.shape[0]
    self.out[:n].copy_(gather(self, ids, values) if self.tp_size > 1 else ids)


def gather(sampler: Any, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The engine's two collectives, in its buffers. The first rank with the largest value wins."""
    n, ranks = ids.shape[0], sampler.tp_size
    best, found = sampler.gathered_max[: ranks * n], sampler.gathered_ids[: ranks * n]
    # Exact: a value is a logit rounded to the model dtype.
    sampler.tp_group.all_gather_into_tensor(best, sampler.local_max[:n].copy_(values))
    sampler.tp_group.all_gather_into_tensor(found, sampler.local_arg[:n].copy_(ids))
    winner = best.view(ranks, n).argmax(0, keepdim=True)
    return found.view(ranks, n).gather(0, winner)[0]


HOOK = Hook("draft_head", "sglang.srt.speculative.dflash_worker_v2:_DflashDraftSampler.__call__", winners,
            read={"0.5.23": "3057b3281555c511"}, finish=choose)
