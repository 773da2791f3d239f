"""How many drafts are verified: a matter of time alone. Costs and drafters are simulated here; clocks are not read."""

import math
import random

import pytest

from dflash_decode.costs import StepCosts
from dflash_decode.lookup import Draft
from dflash_decode.policy import Outlook
from dflash_decode.widths import WidthPolicy, draft_widths

BLOCK = 8


def affine(fixed, row, draft=0.1, most=64):
    """A verify pass takes fixed + row * rows, a draft of one block `draft`, a tenth of it more for each further one."""
    return StepCosts({n: fixed + row * n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most},
                     {n: draft * (0.9 + 0.1 * n / BLOCK) for n in (1, 8, 16, 32, 64)})


def drafts(confidences):
    return Draft(list(range(len(confidences))), confidences)


class Text:
    """A drafter whose drafts are accepted with the probabilities that it gives, and a text of whose steps a share
    `repeats`: then drafts are found, each of which is accepted with the probability `found_sure`. wrong: drafts are
    never accepted."""

    def __init__(self, sure, seed=0, wrong=False, repeats=0.0, found_sure=0.9):
        self.sure, self.dice, self.wrong, self.repeats, self.found_sure = (
            sure, random.Random(seed), wrong, repeats, found_sure)

    def confidences(self):
        return [min(max(self.dice.gauss(self.sure, 0.2), 0.001), 0.999) for _ in range(BLOCK - 1)]

    def found(self):
        return Draft([-1] * 15, matched=12) if self.dice.random() < self.repeats else Draft()

    def accepted(self, draft):
        odds = [self.found_sure] * len(draft.tokens) if draft.matched else draft.confidences
        return next((i for i, p in enumerate(odds) if self.wrong or self.dice.random() >= p), len(odds))


def play(policy, texts, steps, true, choice=0.0):
    """[(tokens, seconds, widths)] of each step. choice: seconds that choosing takes."""
    outlooks, found = [Outlook() for _ in texts], []
    list(played(policy, texts, outlooks, steps, true, found.append, choice))
    return found


def played(policy, texts, outlooks, steps, true, tell=lambda step: None, choice=0.0):
    """Yields whom each step drafts for."""
    for _ in range(steps):
        n, there = len(texts), [text.found() if policy.looks_up(len(texts)) else Draft() for text in texts]
        chosen, block = policy.to_draft(outlooks, there)
        drafted = [drafts(text.confidences()[:block - 1] if i in chosen else []) for i, text in enumerate(texts)]
        blocks = policy.choose(outlooks, drafted, there, [10**6] * n)
        policy.took("choice", n, choice)
        assert all(any(draft == whole.cut(len(draft.tokens)) for whole in pair)
                   for draft, *pair in zip(blocks, drafted, there, strict=True))
        accepted = [text.accepted(draft) for text, draft in zip(texts, blocks, strict=True)]
        widths = [1 + len(draft.tokens) for draft in blocks]
        rows = policy.rows(sum(widths))
        seconds = true.verify(rows) + (true.draft(block * len(chosen)) if chosen else 0.0)
        policy.took("verify", rows, true.verify(rows))
        if chosen:
            policy.took("draft", block * len(chosen), true.draft(block * len(chosen)))
        policy.verified(outlooks, blocks, accepted)
        tell((n + sum(accepted), seconds, widths))
        yield chosen


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

        def to_draft(self, outlooks, found):
            return list(range(len(outlooks))) if self.width > 1 else [], self.width

        def choose(self, outlooks, drafted, found, limits, together=False):
            super().choose(outlooks, drafted, found, limits, together)
            return drafted

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


@pytest.mark.parametrize("others", [0, 1, 3, 7])
def test_a_request_that_becomes_easy_is_found_out_beside_others(others):
    """Its drafts are wrong at first, and those of the others pay in every step."""
    true, policy = affine(1.0, 0.02), WidthPolicy(BLOCK, affine(1.0, 0.02))
    late = Text(0.02, 9)
    texts = [late, *(Text(0.9, seed) for seed in range(others))]
    outlooks = [Outlook() for _ in texts]

    def drafted(steps):
        return sum(0 in step for step in played(policy, texts, outlooks, steps, true)) / steps

    assert drafted(200) < 0.3
    late.sure = 0.95
    drafted(600)
    assert drafted(200) > 0.8


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
@pytest.mark.parametrize("sure", [0.3, 0.6])
def test_what_cannot_pay_is_seldom_tried(batch, sure):
    """A row takes as long as the baseline's rows do, as where arithmetic is all that a step waits for."""
    true, found = affine(0.0, 1.0 / batch, draft=0.3), []
    texts, outlooks = [Text(sure, seed) for seed in range(batch)], [Outlook() for _ in range(batch)]
    tried = list(played(WidthPolicy(BLOCK, true), texts, outlooks, 500, true, found.append))
    assert 1 <= sum(map(bool, tried)) <= 4
    assert ratio(found, true, batch) >= 0.99


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
    policy, sure = WidthPolicy(BLOCK, affine(1.0, 0.05)), [drafts([0.99] * 7), drafts([0.01] * 7)]
    blocks = policy.choose([Outlook(), Outlook()], sure, [Draft()] * 2, [8, 8], together=True)
    assert len({len(draft.tokens) for draft in blocks}) == 1
    assert len(policy.choose([Outlook()], [drafts([0.99] * 7)], [Draft()], [3])[0].tokens) == 2


def test_drafts_of_nobody_are_not_verified():
    policy = WidthPolicy(BLOCK, affine(1.0, 0.0))
    blocks = policy.choose([Outlook(), Outlook()], [Draft(), drafts([0.9] * 7)], [Draft()] * 2, [8, 8])
    assert not blocks[0].tokens and blocks[1].tokens


# ---- drafts from the text itself -------------------------------------------------------------------------------------


def test_the_likelier_of_two_drafts_is_verified():
    policy, outlooks, limits = WidthPolicy(BLOCK, affine(1.0, 0.0)), [Outlook()], [16]
    for sure, matched, want in ((0.99, 2, "drafter"), (0.3, 12, "text"), (0.99, 0, "drafter"), (0.0, 3, "text")):
        drafted, found = Draft([1, 2, 3], [0.9, sure, sure]), Draft([1, 5, 6] if matched else [], matched=matched)
        chosen, = policy.choose(outlooks, [drafted], [found], limits)
        assert chosen.matched == (matched if want == "text" else 0) and chosen.tokens[:1] == [1]
    longer, = policy.choose(outlooks, [Draft([1], [0.9])], [Draft([1, 5, 6], matched=9)], limits)
    assert longer.tokens == [1, 5, 6]


@pytest.mark.parametrize("batch", [1, 4])
def test_drafts_from_the_text_are_free(batch):
    """Where a text repeats itself the drafter is not asked; where it does not, nothing changes."""
    true = affine(1.0, 0.05, draft=0.3)

    def measured(repeats, found_sure=0.95):
        texts = [Text(0.6, seed, repeats=repeats, found_sure=found_sure) for seed in range(batch)]
        policy, asked = WidthPolicy(BLOCK, affine(1.0, 0.05, draft=0.3)), []
        to_draft = policy.to_draft
        policy.to_draft = lambda *args: asked.append(to_draft(*args)) or asked[-1]
        return ratio(play(policy, texts, 1000, true)[200:], true, batch), sum(len(ids) for ids, _ in asked[200:])

    (never, all_asked), (always, none_asked), (half, _) = measured(0.0), measured(1.0), measured(0.5)
    assert never < half < always and always > 1.8 * never and none_asked < 0.1 * all_asked
    wrong, asked = measured(0.5, found_sure=0.0)  # matches that mislead are found out
    assert wrong > 0.9 * never and asked > 0.8 * all_asked


def test_where_drafts_win_nothing_the_loop_rests_from_choosing_them():
    true, policy, rested = affine(1.0, 0.1, draft=0.15), WidthPolicy(BLOCK, affine(1.0, 0.1, draft=0.15)), []
    text, verified = Text(0.9, wrong=True, repeats=0.3), policy.verified
    policy.verified = lambda *args: rested.append(not policy.looks_up(len(args[0]))) or verified(*args)
    play(policy, [text], 500, true, choice=0.04)
    assert sum(rested[200:]) > 150
    text.wrong = False
    play(policy, [text], 500, true, choice=0.04)
    assert sum(rested[-150:]) == 0


def test_the_time_that_choosing_takes_counts():
    """Drafts that win 40 % of a step are chosen where that takes 10 % of it, and seldom where it takes 50."""
    def rested(choice):
        true, policy, steps = affine(1.0, 0.1, draft=2.0), WidthPolicy(BLOCK, affine(1.0, 0.1, draft=2.0)), []
        verified = policy.verified
        policy.verified = lambda *args: steps.append(not policy.looks_up(len(args[0]))) or verified(*args)
        play(policy, [Text(0.5, repeats=0.2, found_sure=0.8)], 1500, true, choice=choice)
        return sum(steps[500:]) / 1000

    assert rested(0.1) < 0.1 and rested(0.5) > 0.5


def test_what_many_requests_cannot_pay_for_one_can():
    """A row costs nothing for one request, and as much as a token for eight."""
    costs = lambda: StepCosts({1: 1.0, 8: 1.0, 9: 1.2, 64: 9.0}, {3: 0.05, 64: 0.8})  # noqa: E731
    policy = WidthPolicy(BLOCK, costs())
    for _ in range(6):
        play(policy, [Text(0.9, seed) for seed in range(8)], 200, costs(), choice=0.05)
        alone = play(policy, [Text(0.9)], 20, costs(), choice=0.05)
    assert sum(tokens for tokens, *_ in alone) > 2 * len(alone) and policy.load(1).won > 0.5 > 0.1 > policy.load(8).won


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
