"""CandidateSelector and its walk -> select_candidates: only the scores on the way, inside the captured draft graph.

The engine scores all K * K edges of each position (build_lattice) and then walks through them (sample_path). Its scores
are put off until the walk. Greedy requests get the same drafts; those of sampled ones follow the same distribution, and
q is theirs. The random numbers are others: each step draws seeds where the original draws its coins.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from dflash_kernels import SamplingTensors, select_candidates

from ..dflash2 import selectable, uncovered
from ..hooks import LEFT, Hook, plan

LOG = logging.getLogger("sglang.dflash_kernels")


@dataclass(frozen=True)
class Candidates:
    """What select_candidates takes besides the engine's ids and settings."""

    values: torch.Tensor
    hidden: torch.Tensor
    anchors: torch.Tensor


def decide(selector: Any) -> bool | str:
    """selector: SGLang's CandidateSelector with its weights loaded."""
    return uncovered(selector) or True


def build_lattice(self, *, candidate_ids, unary_logits, hidden_states, anchor_token_ids):
    if plan(self, "selector", decide, LOG) is None or not selectable(candidate_ids, unary_logits, hidden_states):
        return LEFT
    return Candidates(unary_logits, self.hidden_projection(hidden_states), anchor_token_ids.long())


def sample_path(self, *, candidate_ids, scores, uniforms, temperatures, greedy_mask):
    given: Candidates = scores.made
    seeds = torch.randint(1 << 62, temperatures.shape, device=temperatures.device)
    # Seeds are new in each step, so that positions need not tell its numbers from those of another.
    starts = torch.zeros_like(seeds, dtype=torch.int32)
    tokens, _, q = select_candidates(
        given.values, candidate_ids, given.hidden, given.anchors, self.predecessor_codebook, self.successor_codebook,
        starts, SamplingTensors(temperatures.masked_fill(greedy_mask, 0.0), seeds))
    return tokens, q


MODEL, WORKER = "sglang.srt.models.dflash", "sglang.srt.speculative.dflash_worker_v2"
WALK = "sglang.kernels.ops.speculative.dflash"
HOOK = Hook("selector", f"{MODEL}:CandidateSelector.build_lattice", build_lattice,
            read={"0.5.23": "9d97e17163c8ef3e"}, diverges=True,
            taker=f"{MODEL}:CandidateSelector.sample_path", take=sample_path,
            beside=(f"{MODEL}:_score_edges", f"{WALK}:selector_walk_triton", f"{WALK}:_selector_walk_kernel",
                    f"{WORKER}:_selector_lattice", f"{WORKER}:_SelectorDraftSampler.__call__",
                    f"{WORKER}:DFlashWorkerV2._propose_selector_block"))
