"""Blocks of several widths in one step: whatever is chosen, texts are the same, and the drafter's context is whole."""

import random

import pytest
import torch

from dflash_decode import packed_runner
from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.packed_runner import PackedRunner
from dflash_decode.policy import FixedWidths
from dflash_decode.requests import Request
from dflash_decode.sampling import SamplingParams
from tests.support.decode_runs import Oracle, collect, random_target, requests


class AnyWidths:
    """Drafts for some, and verifies as many rows as dice say."""

    def __init__(self, seed):
        self.dice = random.Random(seed)

    def looks_up(self, requests):
        return True

    def rests(self, requests):
        return self.dice.random() < 0.1

    def to_draft(self, outlooks, found):
        return [i for i in range(len(outlooks)) if self.dice.random() < 0.7], self.dice.randint(2, 5)

    def choose(self, outlooks, drafted, found, limits, together=False):
        blocks = [self.dice.choice(pair) for pair in zip(drafted, found, strict=True)]
        return [draft.cut(self.dice.randint(0, min(len(draft.tokens), limit - 1)))
                for draft, limit in zip(blocks, limits, strict=True)]

    def took(self, part, size, seconds):
        assert part in ("verify", "draft", "context", "choice") and size >= 1 and seconds > 0

    def verified(self, outlooks, drafts, accepted):
        assert all(0 <= a <= len(draft.tokens) for a, draft in zip(accepted, drafts, strict=True))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def target(request):
    return random_target("qwen3", request.param, "cpu", hidden=32, heads=2, kv_heads=1, layers=3)


SAMPLINGS = [SamplingParams(), SamplingParams(0.8, seed=1), SamplingParams(0.7, seed=2, logit_bias={3: 1.0})]


@pytest.mark.parametrize("kinds", [1, 2, 3], ids=["greedy", "sampled", "adjusted"])
def test_no_choice_of_widths_changes_a_text(target, kinds):
    wanted = [Request(r.id, r.prompt, r.max_tokens, (), SAMPLINGS[r.id % kinds]) for r in requests()]
    options = {"max_context": 80, "page_size": 4, "prefill_rows": 16}
    baseline = {key: value[:2] for key, value in collect(
        Decoder(target, None, max_batch=1, **options).stream(wanted)).items()}
    known = {key: value[0] for key, value in baseline.items()}
    for seed in range(4):
        for drafter in (Oracle.knowing(target, known, 0.3, seed=seed), Drafter.random(target, 2, 5)):
            decoder = Decoder(target, drafter, max_batch=(1, 3, 8, 8)[seed], **options)
            decoder.runner.policy, drafter.decoder = AnyWidths(seed), decoder
            found = collect(decoder.stream(wanted))
            assert {key: value[:2] for key, value in found.items()} == baseline, seed


def test_events_tell_the_widths_that_were_verified(target):
    decoder = Decoder(target, Drafter.random(target, 2, 5), max_context=80, page_size=4)
    decoder.runner.policy = AnyWidths(0)
    end, = (event for event in decoder.stream([Request(0, [1, 2], 30)]) if event.finish)
    pairs = list(zip(end.widths, end.acceptance_lengths, strict=True))
    assert all(1 <= length <= width <= 16 for width, length in pairs) and len({width for width, _ in pairs}) > 2


def test_what_is_kept_of_a_step_are_a_request_s_own_rows(target):
    """The others' would stay with them, for as long as it does not draft."""
    decoder = Decoder(target, Drafter.random(target, 2, 5), max_batch=4, max_context=80, page_size=4)
    decoder.runner.policy = policy = FixedWidths(1)
    policy.to_draft = lambda outlooks, found: ([], 1)
    for i in range(4):
        decoder.submit(Request(i, [1 + i, 2], 20))
    for _ in range(8):
        decoder.step()
    kept = [each.rows for live in decoder._active for each in live.features]
    assert len(kept) > 16 and all(rows.base is None for rows in kept)


@pytest.mark.parametrize("fault, rows, kept", [(False, 256, 1024), (True, 256, 1024), (False, 8, 1024), (False, 8, 8)])
def test_drafts_after_steps_without_any_are_those_of_an_unbroken_context(target, fault, rows, kept, monkeypatch):
    """Where nothing was drafted for a while, the drafter's context is written late, in passes of so many rows, or when
    more than `kept` rows wait, and is the same."""
    monkeypatch.setattr(packed_runner, "_CONTEXT_ROWS", rows)
    monkeypatch.setattr(packed_runner, "_KEPT_ROWS", kept)
    if fault:
        keep = PackedRunner.keep
        monkeypatch.setattr(PackedRunner, "keep", lambda self, live, position, features: keep(
            self, live, position + (position > 12), features))

    def drafts(policy, at):
        decoder = Decoder(target, Drafter.random(target, 2, 5), max_context=80, page_size=4)
        decoder.runner.policy = policy
        decoder.submit(Request(0, list(range(9)), 60))
        while not decoder._active or decoder._active[0].context < at:
            decoder.step()
        live, = decoder._active
        decoder.runner.write_context([live])
        slots = [live.pages[t // 4] * 4 + t % 4 for t in range(at)]
        return [side.reshape(-1, *side.shape[2:])[slots].clone() for c in decoder.kv[1] for side in (c.k, c.v)]

    class Never(FixedWidths):
        def to_draft(self, outlooks, found):
            return [], self.block

    same = all(torch.equal(a, b) for a, b in zip(drafts(FixedWidths(5), 30), drafts(Never(5), 30), strict=True))
    assert same or fault
    if fault:
        clean = drafts(Never(5), 30)
        monkeypatch.undo()
        assert not all(torch.equal(a, b) for a, b in zip(clean, drafts(Never(5), 30), strict=True))
