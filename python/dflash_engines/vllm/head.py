"""The draft head and its argmax -> lm_head_argmax: no logits in memory. vLLM's V1 runner."""

import contextlib
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch

from dflash_kernels import PackedWeight, lm_head_argmax, pack_weight

from ..hooks import LEFT, MARK, Hook, forget, plan

LOG = logging.getLogger("vllm.dflash_kernels")


@dataclass(frozen=True)
class Plan:
    """targets: the target's id of each row of the draft head, where the drafter has a vocabulary of its own.
    theirs: the engine's own packed head, which it makes anew when it loads other weights."""

    weight: PackedWeight
    num_valid: int
    targets: torch.Tensor | None
    theirs: Any


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
    valid = min(processor.org_vocab_size, weight.shape[0])
    return Plan(pack_weight(weight), valid, targets, packed_by_engine(proposer))


def packed_by_engine(proposer: Any) -> Any:
    return getattr(proposer.model.lm_head, "cpu_linear", None)


def prepare() -> None:
    """Packs the head where the drafter is loaded: the engine then counts our copy as memory in use, and gives the KV
    cache the rest."""
    from vllm.v1.spec_decode.dflash import DFlashProposer

    loaded = DFlashProposer.load_model
    if hasattr(loaded, MARK):
        return

    @functools.wraps(loaded)
    def load_model(self, *args, **kwargs):
        found = loaded(self, *args, **kwargs)
        with contextlib.suppress(Exception):  # the first step decides again, and says what is wrong
            plan(self, "draft_head", decide, LOG)
        return found

    setattr(load_model, MARK, loaded)
    DFlashProposer.load_model = load_model


def _greedy_sample(self, hidden_states):
    made = plan(self, "draft_head", decide, LOG)
    if made is not None and made.theirs is not packed_by_engine(self):
        forget(self, "draft_head")
        made = plan(self, "draft_head", decide, LOG)
    if made is None or hidden_states.dim() != 2 or hidden_states.dtype != self.dtype:
        return LEFT
    ids, _ = lm_head_argmax(hidden_states, made.weight, num_valid=made.num_valid)
    return ids if made.targets is None else made.targets[ids]


# On the class of DFlash's proposer alone: other methods keep the base class's.
HOOK = Hook("draft_head", "vllm.v1.spec_decode.dflash:DFlashProposer._greedy_sample", _greedy_sample,
            read={"0.32.0": "c0f0a4f5513d58e6", "0.33.0": "c0f0a4f5513d58e6"}, measured={"cpu": True}, prepare=prepare,
            defined="vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer._greedy_sample",
            beside=("vllm.model_executor.models.qwen3_dflash:DFlashQwen3ForCausalLM.compute_logits",))
