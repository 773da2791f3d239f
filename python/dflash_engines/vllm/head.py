"""The draft head and its argmax -> lm_head_argmax: no logits in memory. vLLM's V1 runner."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from dflash_kernels import PackedWeight, lm_head_argmax, pack_weight

from ..hooks import LEFT, Hook, plan

LOG = logging.getLogger("vllm.dflash_kernels")


@dataclass(frozen=True)
class Plan:
    """targets: the target's id of each row of the draft head, where the drafter has a vocabulary of its own."""

    weight: PackedWeight
    num_valid: int
    targets: torch.Tensor | None


def decide(proposer: Any) -> Plan | str:
    """proposer: vLLM's DFlashProposer with its model loaded."""
    model = proposer.model
    head, processor = model.lm_head, model.logits_processor
    if proposer.use_local_argmax_reduction or head.tp_size > 1:
        return f"a vocabulary shared out over {head.tp_size} ranks"
    if proposer.use_heterogeneous_vocab:
        return "a mapping between two tokenizers"
    if processor.soft_cap is not None or processor.scale != 1.0 or processor.logits_as_input:
        return "scaled or capped logits"
    weight = head.weight
    if type(head.quant_method).__name__ not in ("UnquantizedEmbeddingMethod", "UnquantizedLinearMethod"):
        return f"a head of {type(head.quant_method).__name__}"
    if processor.head_dtype not in (None, weight.dtype) or weight.dtype != proposer.dtype:
        return f"a head of {processor.head_dtype} over weights of {weight.dtype}"
    targets, offsets = None, model.draft_id_to_target_id
    if offsets is not None:
        targets = torch.arange(offsets.shape[0], device=offsets.device) + offsets.long()
        if not bool((targets[1:] > targets[:-1]).all()):
            return "a draft vocabulary that is not in the target's order"  # ties would go elsewhere
    return Plan(pack_weight(weight), min(processor.org_vocab_size, weight.shape[0]), targets)


def _greedy_sample(self, hidden_states):
    made = plan(self, "draft_head", decide, LOG)
    if made is None or hidden_states.dim() != 2 or hidden_states.dtype != self.dtype:
        return LEFT
    ids, _ = lm_head_argmax(hidden_states, made.weight, num_valid=made.num_valid)
    return ids if made.targets is None else made.targets[ids]


# On the class of DFlash's proposer alone: other methods keep the base class's.
HOOK = Hook("draft_head", "vllm.v1.spec_decode.dflash:DFlashProposer._greedy_sample", _greedy_sample,
            read={"0.32.0": "c0f0a4f5513d58e6", "0.33.0": "c0f0a4f5513d58e6"}, measured={"cpu": True},
            defined="vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer._greedy_sample",
            beside=("vllm.model_executor.models.qwen3_dflash:DFlashQwen3ForCausalLM.compute_logits",))
