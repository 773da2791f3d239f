"""CandidateSelector and its walk -> select_candidates: only the scores on the way. vLLM's V2 runner, greedy drafting.

The engine scores all K * K edges of each position and then walks through them. Its scores are put off until the walk.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from dflash_kernels import select_candidates

from ..dflash2 import selectable, uncovered
from ..hooks import LEFT, Hook, plan

LOG = logging.getLogger("vllm.dflash_kernels")


@dataclass(frozen=True)
class Plan:
    """starts (requests,) is not read where nothing is drawn. logprobs (requests, drafts) is not read by the engine."""

    selector: Any
    starts: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Candidates:
    """What select_candidates takes besides the engine's ids."""

    plan: Plan
    values: torch.Tensor
    hidden: torch.Tensor
    anchors: torch.Tensor


def decide(speculator: Any) -> Plan | str:
    """speculator: vLLM's DFlash2Speculator with its model loaded."""
    selector, tokens = speculator.model.model.candidate_selector, speculator.draft_tokens
    if type(selector).__name__ != "CandidateSelector":
        return f"a selector of {type(selector).__name__}"
    if speculator.draft_logits is not None:
        return "drafts that are sampled, whose scores the engine keeps"
    if speculator.enable_adaptive_verification:
        return "adaptive verification, which reads the scores"
    if why := uncovered(selector):
        return why
    with torch.inference_mode(False):  # what is made in inference mode may not be written outside it
        return Plan(selector, torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device),
                    torch.empty(tokens.shape, device=tokens.device))


def _score_candidates(self, candidate_ids, unary_logits, hidden_states):
    made = plan(self, "selector", decide, LOG)
    if made is None or not selectable(candidate_ids, unary_logits, hidden_states):
        return LEFT
    width = self.num_query_per_req
    anchors = self.input_buffers.input_ids[:candidate_ids.shape[0] * width:width]
    return Candidates(made, unary_logits, made.selector.hidden_projection(hidden_states), anchors.long())


def sample(self, candidate_ids, scores, num_reqs, sample_pos, idx_mapping, temperature, seeds, draft_tokens,
           draft_logits, use_fp64):
    given: Candidates = scores.made
    if draft_logits is not None or candidate_ids.shape[0] != num_reqs:
        return LEFT
    selector = given.plan.selector
    select_candidates(given.values, candidate_ids, given.hidden, given.anchors, selector.predecessor_codebook,
                      selector.successor_codebook, given.plan.starts[:num_reqs], out_ids=draft_tokens[:num_reqs],
                      out_logprobs=given.plan.logprobs[:num_reqs])


MODEL = "vllm.model_executor.models.qwen3_dflash2"
SPECULATOR = "vllm.v1.worker.gpu.spec_decode.dflash2.speculator"
HOOK = Hook("selector", f"{SPECULATOR}:DFlash2Speculator._score_candidates", _score_candidates,
            read={"0.32.0": "902fcabd0c21733d", "0.33.0": "1950c85112e8d84b"}, diverges=True,
            taker=f"{SPECULATOR}:CandidateSampler.sample", take=sample,
            beside=(f"{SPECULATOR}:DFlash2Speculator._generate_draft", f"{SPECULATOR}:_selector_walk_kernel",
                    f"{MODEL}:CandidateSelector.forward", f"{MODEL}:_score_edges"))
