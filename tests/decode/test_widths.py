"""How many drafts are verified: a matter of time alone. Costs and drafters are simulated here; clocks are not read."""

import json
import math
import random

import pytest
import torch

from dflash_decode import packed_runner
from dflash_decode.chances import Calibration
from dflash_decode.checkpoint import CheckpointError
from dflash_decode.costs import StepCosts
from dflash_decode.loop import Decoder
from dflash_decode.model.calibration import read_calibration
from dflash_decode.model.drafter import Drafter
from dflash_decode.packed_runner import PackedRunner
from dflash_decode.requests import Request
from dflash_decode.sampling import SamplingParams
from dflash_decode.widths import FixedWidths, Outlook, PastWidths, WidthPolicy, draft_widths
from tests.support.decode_runs import Oracle, collect, random_target, requests

BLOCK = 8


def affine(fixed, row, draft=0.1, most=64):
    """A verify pass takes fixed + row * rows, a draft of one block `draft`, a tenth of it more for each further one."""
    return StepCosts({n: fixed + row * n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most},
                     {n: draft * (0.9 + 0.1 * n / BLOCK) for n in (1, 8, 16, 32, 64)})


class Text:
    """A drafter whose drafts are accepted with the probabilities that it gives. wrong: they are never."""

    def __init__(self, sure, seed=0, wrong=False):
        self.sure, self.dice, self.wrong = sure, random.Random(seed), wrong

    def confidences(self):
        return [min(max(self.dice.gauss(self.sure, 0.2), 0.001), 0.999) for _ in range(BLOCK - 1)]

    def accepted(self, confidences):
        return next((i for i, p in enumerate(confidences) if self.wrong or self.dice.random() >= p), len(confidences))


def play(policy, texts, steps, true, block=BLOCK):
    """Tokens a second over that of baseline decoding, step by step: [(tokens, seconds)], and widths."""
    outlooks, found = [Outlook() for _ in texts], []
    for _ in range(steps):
        n, (chosen, block) = len(texts), policy.to_draft(outlooks)
        sure = [text.confidences()[:block - 1] if i in chosen else [] for i, text in enumerate(texts)]
        widths = policy.widths(outlooks, sure, [10**6] * n)
        assert all(1 <= w <= len(c) + 1 for w, c in zip(widths, sure, strict=True))
        accepted = [text.accepted(c[:w - 1]) for text, c, w in zip(texts, sure, widths, strict=True)]
        rows = policy.rows(sum(widths))
        seconds = true.verify(rows) + (true.draft(block * len(chosen)) if chosen else 0.0)
        policy.took("verify", rows, true.verify(rows))
        if chosen:
            policy.took("draft", block * len(chosen), true.draft(block * len(chosen)))
        policy.verified(outlooks, sure, widths, accepted)
        found.append((n + sum(accepted), seconds, widths))
    return found


def ratio(found, true, n):
    tokens, seconds = (sum(f[i] for f in found) for i in (0, 1))
    return tokens / seconds / (n / true.verify(n))


@pytest.mark.parametrize("sure", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("row", [0.01, 0.1, 0.4])
def test_no_fixed_block_is_faster(sure, row):
    true = affine(1.0, row)
    ours = ratio(play(WidthPolicy(BLOCK, affine(1.0, row)), [Text(sure)], 2500, true)[20:], true, 1)

    class Fixed(WidthPolicy):
        def __init__(self, width):
            super().__init__(BLOCK, affine(1.0, row))
            self.width = width

        def to_draft(self, outlooks):
            return list(range(len(outlooks))) if self.width > 1 else [], self.width

        def widths(self, outlooks, confidences, limits, together=False):
            return [self.width] * len(outlooks)

    fixed = [ratio(play(Fixed(width), [Text(sure)], 2500, true)[20:], true, 1) for width in range(1, BLOCK + 1)]
    assert ours >= 0.97 * max(fixed) and ours >= 0.98


def test_fewer_tokens_are_drafted_where_a_draft_costs_what_its_rows_do():
    """As on a CPU with several requests: a draft of 3 tokens each takes 3/8 of a whole block's time."""
    def costs():
        return StepCosts({n: 1.0 + 0.05 * n for n in (1, 64)}, {n: 0.01 * n for n in (3, 64)})

    def measured(policy):
        texts = [Text(0.75, seed) for seed in range(8)]
        found = play(policy, texts, 600, costs())[100:]
        return ratio(found, costs(), 8), policy.drafting

    whole = WidthPolicy(BLOCK, costs())
    whole.draft_widths = [BLOCK]
    (ours, width), (theirs, _) = measured(WidthPolicy(BLOCK, costs())), measured(whole)
    assert ours > 1.1 * theirs and width < BLOCK and draft_widths(BLOCK) == [3, 5, 8] and draft_widths(2) == [2]


def test_requests_get_what_their_own_drafts_are_worth():
    true = affine(1.0, 0.1)
    texts = [Text(0.95), Text(0.95, 1), Text(0.05, 2), Text(0.05, 3)]
    found = play(WidthPolicy(BLOCK, affine(1.0, 0.1)), texts, 300, true)[100:]
    means = [sum(f[2][i] for f in found) / len(found) for i in range(4)]
    assert min(means[:2]) > 2.5 * max(means[2:]) and max(means[2:]) < 1.6


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("sure", [0.0, 0.9])
def test_a_useless_drafter_costs_little_whatever_it_says(batch, sure):
    """sure: what it says of drafts that are never accepted."""
    true = affine(1.0, 0.1, draft=0.15)
    texts = [Text(sure, seed, wrong=True) for seed in range(batch)]
    found = play(WidthPolicy(BLOCK, affine(1.0, 0.1, draft=0.15)), texts, 400, true)
    assert ratio(found[20:], true, batch) >= 0.95
    assert ratio(found[100:], true, batch) >= 0.97


def test_a_drafter_that_becomes_good_is_found_out():
    true, policy, text = affine(1.0, 0.02), WidthPolicy(BLOCK, affine(1.0, 0.02)), Text(0.02)
    play(policy, [text], 200, true)
    text.sure = 0.95
    found = play(policy, [text], 400, true)
    assert ratio(found[300:], true, 1) > 2.5


@pytest.mark.parametrize("batch", [1, 4])
def test_a_planted_wrong_cost_is_mended_within_20_steps(batch):
    """Wide passes ten times too cheap."""
    true = affine(1.0, 0.3)
    wrong = {n: (0.1 if n > batch else 1.0) * true.verify(n) for n in (1, 2, 4, 8, 16, 32, 64)}
    policy = WidthPolicy(BLOCK, StepCosts(wrong, true.draft.table()))
    texts = [Text(0.4, seed) for seed in range(batch)]
    first = play(policy, texts, 20, true)
    assert max(max(widths) for *_, widths in first) == BLOCK
    after = play(policy, texts, 500, true)
    right = ratio(play(WidthPolicy(BLOCK, affine(1.0, 0.3)), texts, 500, true), true, batch)
    assert ratio(after, true, batch) >= max(0.95, 0.92 * right)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("off", [0.5, 2.5])
def test_costs_from_another_day_are_mended(batch, off):
    """Passes of more than the baseline's rows were measured while the machine was slower, or faster."""
    true, texts = affine(1.0, 0.1), [Text(0.7, seed) for seed in range(batch)]
    wrong = {n: (off if n > batch else 1.0) * true.verify(n) for n in (1, 2, 4, 8, 16, 32, 64)}
    policy = WidthPolicy(BLOCK, StepCosts(wrong, true.draft.table()))
    play(policy, texts, 60 * batch, true)  # one request is tried at a time
    right = ratio(play(WidthPolicy(BLOCK, affine(1.0, 0.1)), texts, 600, true), true, batch)
    assert ratio(play(policy, texts, 600, true), true, batch) >= 0.94 * right


def test_one_width_for_all_where_rows_cannot_be_packed():
    policy, sure = WidthPolicy(BLOCK, affine(1.0, 0.05)), [[0.99] * 7, [0.01] * 7]
    widths = policy.widths([Outlook(), Outlook()], sure, [8, 8], together=True)
    assert len(set(widths)) == 1
    assert policy.widths([Outlook()], [[0.99] * 7], [3])[0] <= 3


def test_drafts_of_nobody_are_not_verified():
    policy = WidthPolicy(BLOCK, affine(1.0, 0.0))
    assert policy.widths([Outlook(), Outlook()], [[], [0.9] * 7], [8, 8])[0] == 1


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_a_calibration_follows_what_is_accepted():
    found, dice = Calibration(3), random.Random(0)
    assert found(0, 0.5) == pytest.approx(0.5) and found(0, math.nan) == found(0, 0.0) < 0.001 and found(2, 1.0) > 0.999
    for _ in range(3000):
        sure = dice.random()
        found.observe(0, sure, dice.random() < sure**3)
    for sure in (0.3, 0.5, 0.7, 0.9):
        assert found(0, sure) == pytest.approx(sure**3, abs=0.12)
    for _ in range(300):
        found.observe(1, 0.5, True)
    assert found(1, 0.5) > 0.9
    start = Calibration(3, (0.5, [1.0, -1.0]))
    assert start(0, 0.5) == pytest.approx(1 / (1 + math.exp(-1))) and start(2, 0.5) == start(1, 0.5) < 0.3
    assert start(0, 0.9) == pytest.approx(1 / (1 + math.exp(-1 - 0.5 * math.log(9))))


def test_a_drafter_s_record_is_where_its_calibration_starts(tmp_path):
    assert read_calibration(tmp_path, 3) is None
    file = tmp_path / "calibration.json"
    file.write_text('{"slope": 2, "bias": [0.5, 0, -1]}')
    assert read_calibration(tmp_path, 3) == (2.0, [0.5, 0.0, -1.0])
    for slope, bias in ((None, [0, 0, 0]), (True, [0, 0, 0]), ("1", [0, 0, 0]), (101, [0, 0, 0]), (1, [0, 0]),
                        (1, None), (1, [0, 0, "0"]), (math.nan, [0, 0, 0]), (1, [0, 0, math.inf])):
        file.write_text(json.dumps({"slope": slope, "bias": bias}))
        with pytest.raises(CheckpointError, match="calibration.json: (slope|bias) must be a"):
            read_calibration(tmp_path, 3)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="calibration.json"):
        read_calibration(tmp_path, 3)


# ---- a width for all, from the past ----------------------------------------------------------------------------------


def test_the_past_chooses_among_recorded_widths():
    for row, sure, best in ((0.02, 0.95, 8), (0.5, 0.2, 1), (0.25, 0.8, 4)):
        past, dice, counts = PastWidths(BLOCK), random.Random(1), {}
        for i in range(500):
            width = past.step(1)
            assert width in past.steps() == (1, 4, 8)
            accepted = next((j for j in range(width - 1) if dice.random() >= sure), width - 1)
            past.observe(1, width, 1.0 + row * width + 0.1 * (width > 1), [accepted])
            counts[width] = counts.get(width, 0) + (i >= 200)
        assert counts[best] > 250, (row, sure, counts)


# ---- in the loop -----------------------------------------------------------------------------------------------------


def test_the_forecast_is_what_steps_bring():
    true, texts = affine(1.0, 0.1), [Text(0.7, seed=i) for i in range(3)]
    policy = WidthPolicy(BLOCK, affine(1.0, 0.1))
    found, told = play(policy, texts, 1500, true), policy.forecast
    tokens, seconds = (sum(f[i] for f in found) for i in (0, 1))
    assert (told.steps, told.tokens) == (1500, tokens) and math.isclose(told.seconds, seconds)
    assert math.isclose(told.expected_tokens, tokens, rel_tol=0.03) and math.isclose(told.expected_seconds, seconds)

    policy = WidthPolicy(BLOCK, affine(0.5, 0.05))  # costs that are half of the truth, and drafts that never come true
    texts = [Text(0.7, seed=i, wrong=True) for i in range(3)]
    play(policy, texts, 5, true)
    told = policy.forecast
    assert told.expected_tokens > 1.2 * told.tokens and told.expected_seconds < 0.8 * told.seconds
    play(policy, texts, 200, true)
    later = policy.forecast - told
    assert math.isclose(later.expected_tokens, later.tokens, rel_tol=0.05)
    assert math.isclose(later.expected_seconds, later.seconds, rel_tol=0.05)


class AnyWidths:
    """Drafts for some, and verifies as many rows as dice say."""

    def __init__(self, seed):
        self.dice = random.Random(seed)

    def to_draft(self, outlooks):
        return [i for i in range(len(outlooks)) if self.dice.random() < 0.7], self.dice.randint(2, 5)

    def widths(self, outlooks, confidences, limits, together=False):
        most = [min(len(c) + 1, limit) for c, limit in zip(confidences, limits, strict=True)]
        widths = [self.dice.randint(1, n) for n in most]
        return [max(widths)] * len(widths) if together else widths

    def took(self, part, size, seconds):
        assert part in ("verify", "draft", "context") and size >= 1 and seconds > 0

    def verified(self, outlooks, confidences, widths, accepted):
        assert all(0 <= a < w for a, w in zip(accepted, widths, strict=True))


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
    ends = [event for event in decoder.stream([Request(0, [1, 2], 30)]) if event.finish]
    assert len(ends) == 1 and len(ends[0].widths) == len(ends[0].acceptance_lengths)
    pairs = list(zip(ends[0].widths, ends[0].acceptance_lengths, strict=True))
    assert all(1 <= length <= width <= 5 for width, length in pairs) and len({width for width, _ in pairs}) > 2


@pytest.mark.parametrize("fault, rows", [(False, 256), (True, 256), (False, 8)])
def test_drafts_after_steps_without_any_are_those_of_an_unbroken_context(target, fault, rows, monkeypatch):
    """Where nothing was drafted for a while, the drafter's context is written late, in passes of so many rows, and is
    the same."""
    monkeypatch.setattr(packed_runner, "_CONTEXT_ROWS", rows)
    if fault:
        remember = PackedRunner.remember
        monkeypatch.setattr(PackedRunner, "remember", lambda self, live, kept: remember(
            self, live, kept._replace(position=kept.position + (kept.position > 12))))

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
        def to_draft(self, outlooks):
            return [], self.block

    same = all(torch.equal(a, b) for a, b in zip(drafts(FixedWidths(5), 30), drafts(Never(5), 30), strict=True))
    assert same or fault
    if fault:
        clean = drafts(Never(5), 30)
        monkeypatch.undo()
        assert not all(torch.equal(a, b) for a, b in zip(clean, drafts(Never(5), 30), strict=True))
