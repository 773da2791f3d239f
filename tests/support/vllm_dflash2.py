"""Runs in an environment that has vLLM, on its own modules: what the hooks for DFlash2 do there, as JSON.

    python -m tests.support.vllm_dflash2

Its CPU build has no V2 runner, so that no server reaches these functions there.
"""

import json
import os
import types

import torch
import vllm
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.models import qwen3_dflash2 as models
from vllm.v1.worker.gpu.spec_decode.dflash2 import speculator

HIDDEN, VOCAB, RANK, K, REQUESTS, DRAFTED, GROUP = 96, 60, 24, 5, 3, 4, 16


def convolution():
    """Its arguments, and what the engine's form for a CPU makes of them in float64."""
    x, both, base = (torch.randn(*shape).bfloat16() for shape in ((12, HIDDEN), (12, 2, 2, HIDDEN // GROUP),
                                                                  (2, HIDDEN)))
    given = x, both[:, 1], base
    exact = models._grouped_conv(*(t.double() for t in given), 4, HIDDEN // GROUP, GROUP, 2)
    return given, exact


def drafting():
    """A DFlash2Speculator of theirs with their selector, by what _score_candidates and the walk read."""
    models.ReplicatedLinear = lambda wide, narrow, **_: nn.Linear(wide, narrow, bias=False).requires_grad_(False)
    with set_current_vllm_config(VllmConfig()):  # their linear layer asks for a group of ranks
        chooser = models.CandidateSelector(hidden_size=HIDDEN, vocab_size=VOCAB, rank=RANK, top_k=K,
                                           params_dtype=torch.float32, prefix="")
    for table in (chooser.predecessor_codebook, chooser.successor_codebook):
        table.normal_()
    made = speculator.DFlash2Speculator.__new__(speculator.DFlash2Speculator)
    made.model = types.SimpleNamespace(model=types.SimpleNamespace(candidate_selector=chooser))
    made.input_buffers = types.SimpleNamespace(
        input_ids=torch.randint(VOCAB, (REQUESTS * (DRAFTED + 1),), dtype=torch.int32))
    made.num_query_per_req, made.draft_logits, made.enable_adaptive_verification = DRAFTED + 1, None, False
    made.draft_tokens = torch.full((REQUESTS, DRAFTED), -1)
    made.candidate_sampler = speculator.CandidateSampler(REQUESTS, DRAFTED, K, torch.device("cpu"))
    ids = torch.stack([torch.randperm(VOCAB)[:K] for _ in range(REQUESTS * DRAFTED)]).view(REQUESTS, DRAFTED, K)
    return made, ids, torch.randn(REQUESTS, DRAFTED, K), torch.randn(REQUESTS, DRAFTED, HIDDEN)


def walked(ids, scores):
    """The drafts, by all edges of the engine."""
    place, found = torch.zeros(REQUESTS, dtype=torch.long), []
    for i in range(DRAFTED):
        place = scores[torch.arange(REQUESTS), i, place].argmax(-1)
        found.append(ids[torch.arange(REQUESTS), i, place])
    return torch.stack(found, 1)


def main() -> None:
    torch.manual_seed(1)
    os.environ["DFLASH_VLLM_ENABLE"] = "grouped_conv,selector"
    from dflash_engines import vllm as plugin

    given, exact = convolution()
    made, ids, values, states = drafting()
    scores = made._score_candidates(ids, values, states)
    config = types.SimpleNamespace(speculative_config=types.SimpleNamespace(method="dflash"))
    outcomes = plugin.seen({"vllm_config": config, "device": torch.device("cpu")}, plugin.DFLASH2)
    put_off = made._score_candidates(ids, values, states)
    with torch.inference_mode():
        made.candidate_sampler.sample(ids, put_off, REQUESTS, None, None, None, None, made.draft_tokens, None, False)
        found = torch.ops.vllm.dflash2_grouped_conv(*given, 4, GROUP)
    print(json.dumps({
        "version": vllm.__version__, "outcomes": [str(o) for o in outcomes], "put off": type(put_off).__name__,
        "drafts": made.draft_tokens.tolist(), "by all edges": walked(ids, scores).tolist(),
        "convolution off": float((found - exact).abs().max()), "half a step": float(exact.abs().max()) * 2.0 ** -8}))


if __name__ == "__main__":
    main()
