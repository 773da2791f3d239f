"""Sampled requests in the loop: a seed's text is baseline sampling's, drawn drafts keep the distribution, greedy
neighbours keep their text."""

import dataclasses
import random

import pytest
import torch

from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Request
from dflash_decode.sampling import GREEDY, SamplingParams
from dflash_decode.verify import AdjustedVerifier, GreedyVerifier, SampledVerifier
from dflash_kernels import StepGraph
from dflash_kernels.reference import sample as reference

pytest.importorskip("transformers")
from tests.decode.test_decode_lossless import DTYPES  # noqa: E402
from tests.support.decode_models import VOCAB, make_target  # noqa: E402
from tests.support.decode_runs import PROMPTS, Oracle, run  # noqa: E402
from tests.support.sampled_runs import SAMPLINGS, requests, texts, without_drafter  # noqa: E402


@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sampled_text_is_baseline_sampling_whatever_drafts_block_batch_and_order(family, dtype):
    _, target = make_target(family, dtype)
    wanted = requests()
    baseline = without_drafter(target, wanted)
    known = {key: text for key, (text, _) in baseline.items()}
    assert baseline[1] != baseline[0] and len({tuple(text) for text in known.values()}) == len(known)
    for width in range(2, 9):
        dice = random.Random(width)
        for drafter in (Drafter.random(target, num_layers=2), Oracle.knowing(target, known, 0.25, 8, width)):
            mixed = dice.sample(wanted, len(wanted))
            got = run(target, drafter, mixed, max_batch=dice.choice([1, 3, 8]), max_context=80, block_size=width,
                      rule=dice.choice(["token", "block"]))
            assert texts(got) == baseline
    assert max(n for *_, lengths in got.values() for n in lengths) == 8


def test_p27_each_token_is_drawn_by_hand():
    """From transformers' logits, with the random number of (seed, position), the first token's position being the
    prompt's length."""
    model, target = make_target("llama")
    s = SamplingParams(0.7, 30, 0.95, 0.01, 5)
    got = without_drafter(target, [Request(i, p, 8, (), s) for i, p in enumerate(PROMPTS[:4])])
    one = {name: torch.tensor([getattr(s, name)]) for name in ("top_k", "top_p", "min_p")}
    for i, prompt in enumerate(PROMPTS[:4]):
        text = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                distribution = reference.distribution(
                    model(torch.tensor([text])).logits[:, -1:], torch.tensor([s.temperature]), **one
                )
            u = reference.uniform(torch.tensor([s.seed]), torch.tensor([[len(text)]]), reference.SAMPLE)
            text.append(int(reference.draw(distribution, u)))
        assert got[i][0] == text[len(prompt):]


def test_a_seed_is_a_text_and_another_seed_another():
    _, target = make_target("llama")
    prompts = {seed: Request(seed, [5, 6], 20, (), SamplingParams(1.0, seed=seed)) for seed in (0, 1, 2**32, 2**63 - 1)}
    baseline = without_drafter(target, prompts.values())
    assert len({tuple(text) for text, _ in baseline.values()}) == 4
    assert without_drafter(target, [dataclasses.replace(prompts[1], prompt=[5, 6])])[1] == baseline[1]


def test_p26_greedy_requests_beside_sampled_ones_keep_their_text():
    """Their text is that of a batch with no logits in memory."""
    _, target = make_target("qwen3", torch.bfloat16)
    greedy = without_drafter(target, requests([GREEDY] * 8))
    known = {key: text for key, (text, _) in greedy.items()}
    for sample_from, drafter in (("greedy", Oracle.knowing(target, known, 0.3)),
                                 ("request", Drafter.random(target, num_layers=2, block_size=5))):
        got = texts(run(target, drafter, requests(), max_batch=8, max_context=80, sample_from=sample_from))
        assert {i: got[i] for i in (1, 5)} == {i: greedy[i] for i in (1, 5)}


def test_a_batch_takes_the_least_that_it_needs():
    _, target = make_target("llama")
    adjusted = Request(2, [3], 4, (), SamplingParams(logit_bias={5: 1.0}))
    for wanted, kinds in (([Request(0, [1], 4), Request(1, [2], 4)], {GreedyVerifier}),
                          ([Request(0, [1], 2), Request(1, [2], 6, (), SAMPLINGS[0])], {SampledVerifier}),
                          ([Request(0, [1], 6), Request(1, [2], 3, (), SAMPLINGS[0])],
                           {SampledVerifier, GreedyVerifier}), ([Request(0, [1], 4), adjusted], {AdjustedVerifier})):
        decoder = Decoder(target, None, max_context=32)
        list(decoder.stream(wanted))
        assert {kind for *_, kind in decoder.runner.verifies} == kinds


def test_a_fresh_seed_is_told_and_gives_the_text_again():
    _, target = make_target("llama")
    decoder = Decoder(target, None, max_context=80)
    events = list(decoder.stream(Request(i, [7, 8], 20, (), SamplingParams(1.5)) for i in range(2)))
    seeds = {event.id: event.seed for event in events}
    assert seeds[0] != seeds[1] and all(event.seed == seeds[event.id] for event in events)
    for i, seed in seeds.items():
        text = [token for event in events if event.id == i for token in event.tokens]
        assert without_drafter(target, [Request(0, [7, 8], 20, (), SamplingParams(1.5, seed=seed))])[0][0] == text
    assert all(event.seed is None for event in decoder.stream([Request(0, [1], 3)]))


def test_p20_replayed_sampled_steps_are_live_steps(monkeypatch):
    _, target = make_target("llama", torch.bfloat16)
    drafter = Drafter.random(target, num_layers=2, block_size=5)
    for options in ({}, {"sample_from": "request"}, {"sample_from": "request", "rule": "block"}):
        replayed = run(target, drafter, requests(), max_batch=5, max_context=80, **options)
        with monkeypatch.context() as patch:
            patch.setattr(StepGraph, "available", staticmethod(lambda device="cpu": False))
            assert run(target, drafter, requests(), max_batch=5, max_context=80, **options) == replayed


def test_transformers_targets_sample():
    from tests.decode import test_decode_hf as hf
    for kind in ("llama", "gemma2"):
        target = hf.HFTarget(hf.make(kind))
        wanted = [Request(i, p, 12, (), s) for i, (p, s) in enumerate(zip(hf.PROMPTS, SAMPLINGS, strict=False))]
        baseline = texts(run(target, None, wanted, max_batch=1, max_context=128))
        got = run(target, Drafter.random(target, num_layers=2, block_size=5), wanted, max_batch=3, max_context=128)
        assert texts(got) == baseline
        logits, ids = torch.zeros(7, VOCAB), torch.zeros(7, dtype=torch.int64)
        rows = torch.randn(7, target.hidden_size)
        target.logits(rows, logits)
        target.next_ids(rows, ids, torch.zeros(7))
        assert torch.equal(logits.argmax(-1), ids)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "match"),
    [
        (SamplingParams(temperature=-0.1), r"temperature must be a finite number of at least 0; got -0.1"),
        (SamplingParams(temperature=float("nan")), "temperature must be a finite number of at least 0; got nan"),
        (SamplingParams(temperature="hot"), "temperature must be a finite number of at least 0; got 'hot'"),
        (SamplingParams(top_p=1.5), "top_p must be a finite number from 0 to 1; got 1.5"),
        (SamplingParams(min_p=-1), "min_p must be a finite number from 0 to 1; got -1"),
        (SamplingParams(top_k=-2), r"top_k must be an integer, -1 or 0 \(off\), or up to 2\*\*31 - 1; got -2"),
        (SamplingParams(top_k=2.0), "top_k must be an integer"),
        (SamplingParams(seed=2**63), "seed must be an integer from 0 to"),
        (SamplingParams(seed=True), "seed must be an integer"),
        (SamplingParams(repetition_penalty=0), "repetition_penalty must be a finite number above 0; got 0"),
        (SamplingParams(presence_penalty=float("inf")), "presence_penalty must be a finite number; got inf"),
        (
            SamplingParams(presence_penalty=-1e308),
            r"presence_penalty must be a finite number from -3.40282e\+38 to 3.402",
        ),
        (
            SamplingParams(frequency_penalty=1e308),
            r"frequency_penalty must be a finite number from -3.40282e\+38 to 3.4",
        ),
        (
            SamplingParams(temperature=1e308),
            r"temperature must be a finite number of at least 0, at most 3.40282e\+38; got 1e",
        ),
        (SamplingParams(logit_bias={VOCAB: 1.0}), rf"logit_bias must be for token ids in \[0, {VOCAB}\); got {VOCAB}"),
        (
            SamplingParams(logit_bias={3: "much"}),
            "logit_bias must be numbers that float32 can hold; got 'much' for token 3",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(sampling, match):
    _, target = make_target("llama")
    decoder = Decoder(target, None, max_context=32)
    with pytest.raises((TypeError, ValueError), match=f"request 'x': {match}"):
        decoder.submit(Request("x", [1], 2, (), sampling))
    with pytest.raises(TypeError, match="request 'x': sampling must be a SamplingParams; got 0.7"):
        decoder.submit(Request("x", [1], 2, (), 0.7))


@pytest.mark.parametrize("options", [{"rule": "row"}, {"sample_from": "target"}])
def test_rules_and_sources_are_checked(options):
    _, target = make_target("llama")
    with pytest.raises(ValueError, match=f"Decoder: {next(iter(options))} must be one of"):
        Decoder(target, None, max_context=32, **options)
