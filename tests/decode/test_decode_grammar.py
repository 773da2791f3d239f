"""What a grammar may not do, and what it may: its request alone ends with an error, with the text of baseline
decoding."""

import math

import pytest
import torch

from dflash_decode import adjust
from dflash_decode.loop import Decoder
from dflash_decode.requests import Live, Request
from dflash_decode.sampling import SamplingParams
from dflash_decode.verify import AdjustedVerifier
from dflash_kernels import Proposal
from tests.support.decode_runs import PROMPTS, VOCAB, Oracle, random_target

WORDS = -(-VOCAB // 32)
KEPT = f"grammar: fill_bitmask must leave words as they are, int32 ({WORDS},) on cpu; got "
NONE = f"grammar: fill_bitmask must allow a token in [0, {VOCAB}) that logit_bias does not ban; got none after "


class Grammar:
    """Anything may follow, until `does` comes to the words of an answer of so many tokens."""

    def __init__(self, at, does):
        self.at, self.does = at, does

    def fill_bitmask(self, tokens, words):
        if len(tokens) == self.at:
            self.does(words)


def beyond(words):
    words.copy_(adjust.pack_bits(torch.arange(32 * WORDS) >= VOCAB))


def other_data(tensor):
    def does(words):
        words.data = tensor
    return does


BROKEN = {
    "nothing": (lambda words: words.zero_(), NONE),
    "beyond": (beyond, NONE),
    "resized": (lambda words: words.resize_(1), KEPT + "int32 (1,) on cpu"),
    "longer": (lambda words: words.resize_(WORDS + 1), KEPT + f"int32 ({WORDS + 1},) on cpu"),
    "flat": (lambda words: words.unsqueeze_(0), KEPT + f"int32 (1, {WORDS}) on cpu"),
    "dtype": (other_data(torch.ones(WORDS)), KEPT + f"float32 ({WORDS},) on cpu"),
}


@pytest.fixture(scope="module")
def target():
    return random_target("llama", torch.float32, "cpu", hidden=32, heads=2, kv_heads=1, layers=2)


def answers(target, drafter, asked, **options):
    """{id: (text, finish, error)}"""
    if drafter is not None:
        options.setdefault("block_size", drafter.block_size)
    decoder = Decoder(target, drafter, max_context=80, page_size=4, prefill_rows=16, **options)
    if drafter is not None:
        drafter.decoder = decoder
    found = {}
    for event in decoder.stream(asked):
        text = found[event.id][0] if event.id in found else []
        found[event.id] = (text + event.tokens, event.finish, event.error)
    assert decoder.pool.free_pages == decoder.pool.num_pages
    return found


def request(key, grammar=None, temperature=0.0, **settings):
    return Request(key, PROMPTS[2], 12, (), SamplingParams(temperature, seed=4, grammar=grammar, **settings))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("how", BROKEN)
def test_a_grammar_that_lets_nothing_follow_or_changes_its_words_ends_its_request_alone(target, how, at, temperature):
    does, why = BROKEN[how]
    good = answers(target, None, [request("good"), request("free", temperature=temperature)])
    text = good["free"][0]
    known = {"bad": text, "good": good["good"][0]}
    for drafter in (None, *(Oracle.knowing(target, known, faults) for faults in (0.0, 0.3))):
        found = answers(target, drafter, [request("bad", Grammar(at, does), temperature), request("good")])
        said = f"request 'bad': {why}" + (f"{at} tokens" if why == NONE else "")
        assert found["good"] == good["good"]
        assert found["bad"][1:] == ("error", said)
        assert found["bad"][0] == text[:at]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_nothing_may_follow_a_draft_that_is_not_answered(target, rule):
    """The drafter proposes a way that ends nowhere; the target does not go it, and nobody hears of it."""
    text = answers(target, None, [request(0)])[0][0]
    drafts = [token if i % 3 else (token + 1) % VOCAB for i, token in enumerate(text)]  # which no answer follows
    asked = []

    class Follows:
        def fill_bitmask(self, tokens, words):
            if list(tokens) != text[:len(tokens)]:
                asked.append(len(tokens))
                words.zero_()

    oracle = Oracle.knowing(target, {0: drafts}, 0.0)
    assert answers(target, oracle, [request(0, Follows())], rule=rule)[0] == (text, "length", None)
    assert len(asked) >= 2


class Breaks:
    """Raises at every draft that no answer follows, and at everything once it has raised twice, like a matcher that has
    a limit and is made anew once."""

    def __init__(self, text):
        self.text, self.raised = text, 0

    def fill_bitmask(self, tokens, words):
        if list(tokens) != self.text[:len(tokens)] or self.raised > 1:
            self.raised += 1
            raise ValueError("too many expressions")


def test_a_grammar_that_a_draft_broke_is_asked_about_no_more_drafts(target):
    text = answers(target, None, [request(0)])[0][0]
    oracle = Oracle.knowing(target, {0: [token if i % 3 else (token + 1) % VOCAB for i, token in enumerate(text)]}, 0.0)
    breaks = Breaks(text)
    decoder = oracle.decoder = Decoder(target, oracle, block_size=oracle.block_size, max_context=80, page_size=4)
    events = list(decoder.stream([request(0, breaks)]))
    assert [token for event in events for token in event.tokens] == text and events[-1].error is None
    assert breaks.raised == 1 and events[-1].widths[-3:] == (1, 1, 1)  # nor is anything drafted


class Deaf:
    """The target's logits are those of every row."""

    device, dtype, vocab_size = torch.device("cpu"), torch.float32, 40

    def logits(self, rows, into):
        into.copy_(rows)


def test_a_drawn_draft_after_which_nothing_may_follow_is_accepted_as_often_as_any(target):
    """Its chance to be offered must not depend on its value: else the other tokens come too often. Nothing is drawn
    after it, so the request ends in the next step. Without a temperature drafts are not drawn."""
    n, q = 2000, torch.tensor([0.3, 0.3, 0.4])
    p = torch.full((40,), -30.0)
    p[:3] = torch.tensor([0.5, 0.2, 0.3]).log()

    class Ends:
        def fill_bitmask(self, tokens, words):
            if tokens == [1]:
                words.zero_()

    drafts = torch.multinomial(q, n, True, generator=torch.Generator().manual_seed(0))
    live = [Live(Request(i, [5], 4), 4, SamplingParams(float(i > 0), seed=i, grammar=Ends())) for i in range(n)]
    drafts[0] = 1
    verifier = AdjustedVerifier(Deaf(), n, 2)
    verifier.seat(live)
    proposal = Proposal(probs=q.expand(n, 1, 3).contiguous(), ids=torch.arange(3).expand(n, 1, 3).contiguous())
    found = verifier.run(p.expand(2 * n, 40), torch.stack((torch.full((n,), 5), drafts), 1),
                         torch.ones(n, dtype=torch.int32), proposal=proposal)
    first = torch.bincount(found.tokens[:, 0], minlength=3)[:3] / n
    assert (first - p[:3].exp()).abs().max() < 0.04
    ended = (found.accept_lens == 1) & (drafts == 1)
    assert 0 < ended.sum() < n / 4 and not any(one.error for one in live)
    assert (found.commit_lens == torch.where(ended, 1, found.accept_lens + 1)).all()
    assert (found.new_lens == 1 + found.commit_lens).all() and (found.tokens[ended] == torch.tensor([1, -1])).all()
    assert (found.bonus[ended] == 1).all() and found.tokens[0].tolist() == [0, -1]


def test_what_a_grammar_does_to_its_words_later_changes_nothing(target):
    free = answers(target, None, [request(0)])[0]
    kept = []

    class Keeps:
        def fill_bitmask(self, tokens, words):
            for old in kept:
                old.zero_()
            kept.append(words)

    oracle = Oracle.knowing(target, {0: free[0]}, 0.2)
    assert answers(target, oracle, [request(0, Keeps())])[0] == free


def test_the_only_token_that_may_follow_is_not_one_that_is_banned(target):
    class One:
        def fill_bitmask(self, tokens, words):
            words.copy_(adjust.pack_bits(torch.arange(VOCAB) == 7))

    found = answers(target, None, [request("bad", One(), logit_bias={7: -math.inf}), request("good", One())])
    assert found["bad"] == ([], "error", f"request 'bad': {NONE}0 tokens")
    assert found["good"] == ([7] * 12, "length", None)


def test_bits_are_unpacked_as_they_are_packed():
    mask = torch.rand(VOCAB) < 0.5
    mask[31] = mask[VOCAB - 1] = True
    assert torch.equal(adjust.unpack_bits(adjust.pack_bits(mask), VOCAB), mask)
