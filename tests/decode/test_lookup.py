"""Drafts from a request's own text, against a search of all of it."""

import contextlib
import random

import pytest
import torch

from dflash_decode.costs import StepCosts
from dflash_decode.lookup import LONGEST, Draft, Lookup
from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Live, Request
from dflash_decode.sampling import SamplingParams
from dflash_decode.widths import WidthPolicy
from tests.support.decode_runs import collect, random_target


def drafts_of(text, most):
    lookup = Lookup()
    lookup.read(text)
    return lookup.draft(most)


def searched(text, most):
    """The same by trying every place, the last first."""
    best, start = 1, 0
    for end in range(len(text) - 1, 0, -1):
        n = 0
        while n < LONGEST and n < end and text[end - 1 - n] == text[-1 - n]:
            n += 1
        if n > best:
            best, start = n, end
    if best == 1:
        return Draft()
    found = list(text)
    for i in range(most):
        found.append(found[start + i])
    return Draft(found[len(text):], matched=best)


@pytest.mark.parametrize("tokens", [2, 5, 40])
def test_drafts_follow_the_longest_match(tokens):
    dice = random.Random(tokens)
    for _ in range(300):
        text = [dice.randrange(tokens) for _ in range(dice.randint(0, 30))]
        for most in (0, 1, 7, 40):
            assert drafts_of(text, most) == searched(text, most), text


def test_a_text_that_repeats_itself_goes_on():
    assert drafts_of([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 7) == Draft([3, 4, 1, 2, 3, 4, 1], matched=6)
    assert drafts_of([7] * 40, 15) == Draft([7] * 15, matched=LONGEST)
    assert drafts_of([1, 2, 3], 5) == drafts_of([5, 2, 6, 2], 5) == drafts_of([1], 5) == drafts_of([], 5) == Draft()


def test_of_equal_matches_the_newest_counts():
    assert drafts_of([1, 2, 8, 1, 2, 9, 1, 2], 1) == Draft([9], matched=2)


def test_a_text_is_read_as_it_grows():
    dice = random.Random(0)
    whole, lookup, read = [dice.randrange(4) for _ in range(200)], Lookup(), 0
    while read < len(whole):
        more = whole[read:read + dice.randint(0, 5)]
        lookup.read(more)
        read += len(more)
        assert lookup.draft(6) == searched(whole[:read], 6)


def test_an_interrupt_while_reading_leaves_a_text_that_goes_on():
    class Stops(list):
        def append(self, token):
            if len(self) in stops:
                stops.discard(len(self))
                raise KeyboardInterrupt
            super().append(token)

    text, stops = [1, 2, 1, 2, 3, 1, 2, 3, 1, 2], {2, 3, 7, 9}
    lookup = Lookup()
    lookup.tokens = Stops()
    while len(lookup.tokens) < len(text):
        with contextlib.suppress(KeyboardInterrupt):
            lookup.read(text[len(lookup.tokens):])
    assert lookup.draft(5) == searched(text, 5)


def test_prompt_and_answer_are_one_text():
    live = Live(Request(0, [5, 6, 7, 5], 10), 10, SamplingParams())
    live.take([6])
    assert live.looked_up(3) == Draft([7, 5, 6], matched=2)
    live.take([7, 8])
    assert live.looked_up(3) == Draft()
    live.take([5, 6, 7])
    assert live.looked_up(2) == Draft([8, 5], matched=3)


def test_a_repetition_is_verified_in_long_blocks():
    """What follows is known, so blocks are longer than any that the drafter fills; the text is the baseline's."""
    target = random_target("qwen3", torch.float32, "cpu", hidden=32, heads=2, kv_heads=1, layers=1)
    options = {"max_context": 400, "page_size": 16}
    wanted = [Request(0, [3, 4], 300)]  # a small random target soon repeats itself
    baseline, = collect(Decoder(target, None, **options).stream(wanted)).values()
    decoder = Decoder(target, Drafter.random(target, 1, 4), max_batch=1, **options)
    decoder.runner.policy = WidthPolicy(4, StepCosts({1: 1.0, 16: 1.1}, {4: 0.1}))
    widths = []
    verified = decoder.runner.policy.verified
    decoder.runner.policy.verified = lambda outlooks, drafts, accepted: (
        widths.append(len(drafts[0].tokens)), verified(outlooks, drafts, accepted))
    found, = collect(decoder.stream(wanted)).values()
    assert found[:2] == baseline[:2]
    assert drafts_of(baseline[0], 4).matched == LONGEST, "the text does not repeat itself"
    assert max(widths) == 15 and len(widths) < 150
