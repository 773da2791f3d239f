"""What a request may be, and that a bad one ends alone: the others' texts are as if it had never come."""

import array
import math
from collections import deque

import numpy as np
import pytest
import torch

from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Request
from dflash_decode.sampling import SamplingParams
from dflash_kernels.testing import same_bits
from tests.support.decode_runs import PROMPTS, VOCAB, Oracle, collect, random_target, requests, run

IDS = "a sequence of token ids, or a tensor or array of one dimension"


class Grammar:
    """Allows everything, and raises the error when it is asked for the `at`-th time, and from then on."""

    def __init__(self, error, at=1):
        self.error, self.left = error, at

    def fill_bitmask(self, tokens, words):
        self.left -= 1
        if self.left <= 0:
            raise self.error


class Unreadable(list):
    def __len__(self):
        raise OSError("the file is gone")


class Nameless(Exception):
    def __str__(self):
        raise RuntimeError


def sampled(**settings):
    return Request("bad", [1, 2], 8, (), SamplingParams(**settings))


def prompted(prompt, n=4, stops=()):
    return Request("bad", prompt, n, stops)


# What is asked, and the error of it alone.
BAD = [
    (sampled(presence_penalty=1e308),
     "presence_penalty must be a finite number from -3.40282e+38 to 3.40282e+38; got 1e"),
    (sampled(frequency_penalty=-(10**400)),
     "frequency_penalty must be a finite number from -3.40282e+38 to 3.40282e+38; got -100"),
    (sampled(temperature=10**400), "temperature must be a finite number of at least 0, at most 3.40282e+38; got 100"),
    (sampled(temperature=10**5000), "temperature must be a finite number of at least 0, at most 3.40282e+38; got "),
    (sampled(temperature=float("inf")), "temperature must be a finite number of at least 0; got inf"),
    (sampled(temperature=True), "temperature must be a finite number of at least 0; got True"),
    (sampled(repetition_penalty=1e-300), "repetition_penalty must be a finite number above 0, at least 1.17549e-38"),
    (sampled(top_k=None), "top_k must be an integer, -1 or 0 (off), or up to 2**31 - 1; got None"),
    (sampled(seed=1.0), "seed must be an integer from 0 to 2**63 - 1; got 1.0"),
    (sampled(logit_bias=None), "logit_bias must be a mapping of token ids to numbers; got None"),
    (sampled(logit_bias=[1.0]), "logit_bias must be a mapping of token ids to numbers; got [1.0]"),
    (sampled(logit_bias={3: 10**400}), "logit_bias must be numbers that float32 can hold; got 1000"),
    (sampled(logit_bias={3: 1e39}), "logit_bias must be numbers that float32 can hold; got 1e+39 for token 3"),
    (sampled(logit_bias={3: None}), "logit_bias must be numbers that float32 can hold; got None for token 3"),
    (sampled(logit_bias={True: 1.0}), f"logit_bias must be for token ids in [0, {VOCAB}); got True"),
    (sampled(logit_bias=dict.fromkeys(range(VOCAB), -math.inf)),
     f"logit_bias must leave a token that it does not ban; got -inf for all {VOCAB}"),
    (sampled(grammar=5), "grammar must have a method fill_bitmask; got 5"),
    (sampled(grammar=Grammar(RuntimeError("no such rule"))), "grammar: RuntimeError: no such rule"),
    (sampled(grammar=Grammar(StopIteration())), "grammar: StopIteration: "),
    (sampled(grammar=Grammar(Nameless())), "grammar: Nameless"),
    (Request("bad", [1], 8, (), {"temperature": 1}), "sampling must be a SamplingParams; got {'temperature': 1}"),
    (prompted({1, 2}), f"prompt must be {IDS}; got {{1, 2}}"),
    (prompted({1: 2}), f"prompt must be {IDS}; got {{1: 2}}"),
    (prompted(None), f"prompt must be {IDS}; got None"),
    (prompted(5), f"prompt must be {IDS}; got 5"),
    (prompted("hello"), f"prompt must be {IDS}; got 'hello'"),
    (prompted(b"hello"), f"prompt must be {IDS}; got b'hello'"),
    (prompted(iter([1])), f"prompt must be {IDS}; got <list_iterator"),
    (prompted(torch.tensor([[1, 2]])), f"prompt must be {IDS}; got tensor([[1, 2]])"),
    (prompted(np.zeros((1, 3), dtype=np.int64)), f"prompt must be {IDS}; got array([[0, 0, 0]])"),
    (prompted(torch.tensor(1)), f"prompt must be {IDS}; got tensor(1)"),
    (prompted([]), "prompt must have at least 1 token; got 0"),
    (prompted(np.array([], dtype=np.int64)), "prompt must have at least 1 token; got 0"),
    (prompted([1, True]), f"prompt must hold token ids in [0, {VOCAB}); got True"),
    (prompted([1, 2.0]), f"prompt must hold token ids in [0, {VOCAB}); got 2.0"),
    (prompted(torch.tensor([1.0])), f"prompt must hold token ids in [0, {VOCAB}); got 1.0"),
    (prompted(np.array([True])), f"prompt must hold token ids in [0, {VOCAB}); got True"),
    (prompted([np.int64(VOCAB)]), f"prompt must hold token ids in [0, {VOCAB}); got {np.int64(VOCAB)!r}"),
    (prompted([-1]), f"prompt must hold token ids in [0, {VOCAB}); got -1"),
    (prompted([1, None]), f"prompt must hold token ids in [0, {VOCAB}); got None"),
    (prompted([10**5000]), f"prompt must hold token ids in [0, {VOCAB}); got "),
    (prompted(range(10**12)), "prompt must be shorter than the context of 80 tokens; got 1000000000000"),
    (prompted(Unreadable([1])), "OSError: the file is gone"),
    (prompted([1], 0), "max_tokens must be an integer of at least 1; got 0"),
    (prompted([1], True), "max_tokens must be an integer of at least 1; got True"),
    (prompted([1], 2.0), "max_tokens must be an integer of at least 1; got 2.0"),
    (prompted([1], None), "max_tokens must be an integer of at least 1; got None"),
    (Request("bad", [1], 4, logprobs=-1), f"logprobs must be an integer from 0 to {VOCAB}; got -1"),
    (Request("bad", [1], 4, logprobs=VOCAB + 1), f"logprobs must be an integer from 0 to {VOCAB}; got 98"),
    (Request("bad", [1], 4, logprobs=True), f"logprobs must be an integer from 0 to {VOCAB}; got True"),
    (prompted([1], 4, 5), "stop_tokens must be a collection of token ids; got 5"),
    (prompted([1], 4, None), "stop_tokens must be a collection of token ids; got None"),
    (prompted([1], 4, "end"), "stop_tokens must be a collection of token ids; got 'end'"),
    (prompted([1], 4, [1, "end"]), "stop_tokens must hold token ids; got 'end'"),
    (prompted([1], 4, range(10**9)), f"stop_tokens must be at most the vocabulary's {VOCAB}; got 1000000000"),
]
NO_REQUESTS = ["hello", 5, {"id": 0}, Request]


@pytest.fixture(scope="module")
def target():
    return random_target("llama", torch.float32, "cpu", hidden=32, heads=2, kv_heads=1, layers=2)


@pytest.fixture(scope="module")
def texts(target):
    return {key: value[0] for key, value in run(target, None, requests(), max_context=80).items()}


@pytest.mark.parametrize(("bad", "why"), BAD, ids=[why[:60] for _, why in BAD])
def test_one_bad_request_does_not_end_the_stream_for_everybody(target, texts, bad, why):
    good = requests()
    decoder = Decoder(target, None, max_context=80, max_batch=3, page_size=4)
    events = list(decoder.stream([good[2], bad, *good[:2], *good[3:]]))
    failed = [event for event in events if event.finish == "error"]
    assert [event.id for event in failed] == ["bad"] and why in failed[0].error, failed
    assert len(failed[0].error) < 400 and "\n" not in failed[0].error
    found = collect(event for event in events if event.finish != "error")
    assert {key: value[0] for key, value in found.items()} == texts
    assert decoder.pool.free_pages == decoder.pool.num_pages


@pytest.mark.parametrize("bad", NO_REQUESTS, ids=repr)
def test_what_is_no_request_is_an_error_event_without_an_id(target, texts, bad):
    decoder = Decoder(target, None, max_context=80)
    events = list(decoder.stream([*requests()[:3], bad, *requests()[3:]]))
    (failed,) = [event for event in events if event.finish == "error"]
    assert failed.id is None and failed.error.startswith("request must be a Request; got ")
    assert {key: value[0] for key, value in collect(e for e in events if e is not failed).items()} == texts
    with pytest.raises(TypeError, match="request must be a Request"):
        decoder.submit(bad)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("at", [1, 2, 7, 25])
def test_a_grammar_that_raises_in_mid_answer_ends_its_request_alone(target, texts, at, speculative):
    """And what it said before is told."""
    oracle = Oracle.knowing(target, texts | {"bad": texts[3]}, 0.3) if speculative else None
    decoder = Decoder(target, oracle, max_context=80, max_batch=4, page_size=4)
    if oracle:
        oracle.decoder = decoder
    bad = Request("bad", PROMPTS[3], 29, (), SamplingParams(grammar=Grammar(ValueError("not now"), at)))
    events = list(decoder.stream([*requests()[2:5], bad, *requests()[:2], *requests()[5:]]))
    (failed,) = [event for event in events if event.finish == "error"]
    assert failed.id == "bad" and failed.error == "request 'bad': grammar: ValueError: not now"
    said = [token for event in events if event.id == "bad" for token in event.tokens]
    assert said == texts[3][:len(said)] and sum(failed.acceptance_lengths) == max(len(said) - 1, 0)
    assert len(said) == at - 1 if not speculative else len(said) < 29
    assert {k: v[0] for k, v in collect(e for e in events if e.id != "bad").items()} == texts
    assert decoder.pool.free_pages == decoder.pool.num_pages


def test_penalties_that_float32_cannot_count_are_as_strong_as_they_can_be(target):
    """Each of them is a float32; together, or times a count, they are more."""
    biggest = torch.finfo(torch.float32).max
    for settings in ({"frequency_penalty": biggest, "presence_penalty": biggest}, {"frequency_penalty": -biggest},
                     {"logit_bias": {5: -biggest}, "presence_penalty": biggest},
                     {"logit_bias": {5: float("inf"), 6: float("-inf")}, "frequency_penalty": 1e38}):
        request = Request(0, [5, 6], 20, (), SamplingParams(**settings))
        text, finish, _ = run(target, None, [request], max_context=80)[0]
        assert finish == "length" and len(text) == 20
        if settings.get("frequency_penalty") == biggest:
            assert len(set(text)) == 20
        if settings.get("frequency_penalty") == -biggest:
            assert len(set(text[1:])) == 1


FORMS = {
    "list": list, "tuple": tuple, "deque": deque, "array": lambda p: array.array("q", p), "numpy": np.array,
    "numpy int32": lambda p: np.array(p, np.int32), "list of numpy ints": lambda p: list(np.array(p, np.int64)),
    "torch": torch.tensor, "torch int32": lambda p: torch.tensor(p, dtype=torch.int32),
    "view": lambda p: torch.tensor(p).repeat(2)[:len(p)]}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_come_as_users_have_them(target, texts, form):
    wanted = [Request(r.id, FORMS[form](r.prompt), np.int64(r.max_tokens), np.array([VOCAB + 5]),
                      SamplingParams(np.float32(0.0), np.int64(0), np.float64(1.0), seed=np.int64(3)))
              for r in requests()]
    assert {key: value[0] for key, value in run(target, None, wanted, max_context=80).items()} == texts


@pytest.mark.parametrize("stops", [lambda s: [s], lambda s: {s}, lambda s: (s, s), lambda s: {s: 1}.keys(),
                                   lambda s: np.array([s]), lambda s: torch.tensor([s, -1]), lambda s: range(s, s + 1)])
def test_stop_tokens_come_as_users_have_them(target, texts, stops):
    stop = texts[4][6]
    got = run(target, None, [Request(4, PROMPTS[4], 30, stops(stop))], max_context=80)[4]
    assert got[:2] == (texts[4][:texts[4].index(stop) + 1], "stop")


def test_a_long_prompt_keeps_nobody_waiting_who_leaves(target):
    """While nothing else is decoded, a step runs one pass of it."""
    decoder = Decoder(target, max_batch=2, max_context=80, page_size=4, prefill_rows=16)
    decoder.submit(Request("long", list(range(60)), 4))
    assert decoder.step() == [] and decoder._requests[0].prefilled == 16
    decoder.submit(Request("short", [5], 1))
    decoder.cancel("long")
    events = decoder.step()
    assert [(event.id, event.finish) for event in events] == [("long", "cancelled"), ("short", "length")]


def test_a_prompt_is_read_when_it_is_submitted(target, texts):
    prompt = list(PROMPTS[4])
    decoder = Decoder(target, None, max_context=80)
    decoder.submit(Request(4, prompt, 30))
    prompt[:] = [VOCAB + 1] * 3
    found = collect(decoder.stream(()))
    assert found[4][0] == texts[4]


def test_an_id_is_new_and_hashable(target, texts):
    decoder = Decoder(target, None, max_context=80)
    for bad, why in ((np.zeros(2), "id must be hashable; got a ndarray"), ([1], "id must be hashable; got a list"),
                     (([1], 2), "id must be hashable; got a tuple")):
        with pytest.raises(TypeError, match=why):
            decoder.submit(Request(bad, [1], 2))
    events = list(decoder.stream([requests()[3], requests()[3], requests()[4]]))
    assert [e.error for e in events if e.error] == ["request 3: id must be new; got that of a request that still runs"]
    decoder.submit(requests()[3])
    decoder.cancel(3)
    decoder.submit(requests()[3])  # the one before has been told to leave
    events = list(decoder.stream(()))
    assert [e.finish for e in events if e.finish] == ["cancelled", "length"]
    assert [token for event in events for token in event.tokens] == texts[3]


def test_a_grammar_may_cancel_its_own_request(target, texts):
    class Leaves:
        def fill_bitmask(self, tokens, words):
            if len(tokens) == 4:
                decoder.cancel("leaver")

    decoder = Decoder(target, None, max_context=80)
    leaver = Request("leaver", PROMPTS[3], 20, (), SamplingParams(grammar=Leaves()))
    found = collect(decoder.stream([leaver, *requests()]))
    assert found.pop("leaver") == (texts[3][:4], "cancelled", (1, 1, 1))
    assert {key: value[0] for key, value in found.items()} == texts


def test_requests_that_raise_end_the_stream_and_free_its_pages(target, texts):
    """The documented end: nobody knows what else was to come."""
    def broken():
        yield from requests()[2:5]
        raise OSError("the socket is gone")

    decoder = Decoder(target, Drafter.random(target, num_layers=2), max_context=80)
    with pytest.raises(OSError, match="the socket is gone"):
        list(decoder.stream(broken()))
    assert decoder.pool.free_pages == decoder.pool.num_pages
    assert {key: value[0] for key, value in collect(decoder.stream(requests())).items()} == texts


def test_what_fails_as_a_request_starts_fails_that_request_and_is_raised_once(target, texts, monkeypatch):
    """No fault of the request's: the caller hears of it, and can go on with the others."""
    decoder = Decoder(target, None, max_context=80, max_batch=4)
    decoder.submit(requests()[4])
    events = decoder.step()
    decoder.submit(requests()[3])
    with monkeypatch.context() as patch:
        patch.setattr("dflash_decode.loop.first_token", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.step()
    while decoder._requests:
        events += decoder.step()
    (failed,) = [event for event in events if event.error]
    assert failed.id == 3 and failed.error == "request 3: ZeroDivisionError: division by zero"
    assert [token for event in events if event.id == 4 for token in event.tokens] == texts[4]
    assert decoder.pool.free_pages == decoder.pool.num_pages


def test_the_context_of_a_request_beside_a_failed_one_is_its_own(target):
    """A row that fails between draft and verification writes nothing into its neighbours' pages."""
    kept = []
    for grammar in (None, Grammar(RuntimeError("x"), 5)):
        decoder = Decoder(target, None, max_context=80, page_size=4, num_pages=40)
        for caches in decoder.kv[0]:
            caches.k.zero_(), caches.v.zero_()
        decoder.submit(Request(0, PROMPTS[3], 12, (), SamplingParams(logit_bias={1: 0.5})))
        decoder.submit(Request("bad", PROMPTS[2], 12, (), SamplingParams(logit_bias={1: 0.5}, grammar=grammar)))
        for _ in range(8):
            decoder.step()
        pages = decoder._active[0].pages
        kept.append([t[pages] for cache in decoder.kv[0] for t in (cache.k, cache.v)])
    assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(*kept, strict=True))
