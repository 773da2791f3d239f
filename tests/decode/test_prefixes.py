"""A prompt that begins like an earlier text starts from its K/V: the same bits, and so the same answer."""

import random

import pytest
import torch

from dflash_decode.kv import OutOfPages, PagePool
from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.policy import FixedWidths
from dflash_decode.prefixes import Prefixes
from dflash_decode.requests import Request
from dflash_decode.sampling import SamplingParams
from dflash_kernels.testing import same_bits
from tests.support.decode_runs import VOCAB, random_target

TEXT = list(range(40))
OPTIONS = {"max_context": 64, "page_size": 4, "prefill_rows": 16}


# ---- which pages are found, and which are given away -----------------------------------------------------------------


def test_the_longest_known_beginning_is_found_in_whole_pages():
    known = Prefixes(4)
    known.add(TEXT[:11], [7, 3, 5])
    assert known.find(TEXT) == known.find(TEXT[:8]) == [7, 3] and known.find(TEXT[:7]) == [7]
    assert known.find(TEXT[:4]) == [7] and known.find(TEXT[:3]) == known.find(TEXT[1:]) == known.find([]) == []
    assert known.find([*TEXT[:4], 99, *TEXT[5:]]) == [7]
    assert known.find([*TEXT[4:8], *TEXT[4:8]]) == []  # the same tokens after others
    assert known.pages() == {3, 7}


def test_a_salt_has_pages_of_its_own():
    known = Prefixes(4)
    known.add(TEXT[:8], [0, 1], "one")
    assert known.find(TEXT, "one") == [0, 1] and known.find(TEXT) == known.find(TEXT, "other") == []
    known.add(TEXT[:8], [2, 3], "\ud800")
    assert known.find(TEXT, "\ud800") == [2, 3]


def test_the_first_page_with_some_tokens_stays_theirs():
    known = Prefixes(4)
    known.add(TEXT[:8], [0, 1])
    known.add(TEXT[:12], [4, 5, 6])
    assert known.find(TEXT) == [0, 1, 6]


def test_what_was_used_last_is_forgotten_last_and_no_page_outlasts_those_before_it():
    known = Prefixes(4)
    known.add(TEXT[:12], [0, 1, 2])
    known.add([*TEXT[:4], *TEXT[20:28]], [0, 3, 4])
    known.find(TEXT[:8])
    left = []
    for most in range(4, -1, -1):
        known.trim(most, ())
        left.append(known.pages())
    assert left == [{0, 1, 3, 4}, {0, 1, 3}, {0, 1}, {0}, set()]


def test_pages_in_use_are_not_counted_and_not_forgotten():
    known = Prefixes(4)
    known.add(TEXT[:12], [0, 1, 2])
    known.trim(1, {0, 1})
    assert known.pages() == {0, 1, 2}
    known.trim(0, {0, 1})
    assert known.pages() == {0, 1}


def test_kept_pages_are_free_and_the_last_to_be_given():
    pool = PagePool(5, 4, most_kept=5)
    first = pool.allocate(12)
    pool.prefixes.add(TEXT[:12], first)
    pool.keep([])
    assert pool.free_pages == 5
    second = pool.allocate(8)
    assert set(second) == {3, 4} and pool.prefixes.find(TEXT) == first
    third = pool.allocate(4)
    assert third == [first[2]] and pool.prefixes.find(TEXT) == first[:2]
    with pytest.raises(OutOfPages, match="24 tokens need 4 pages of 4; 0 of 5 are free"):
        pool.allocate(24, first[:2])
    assert pool.prefixes.find(TEXT) == first[:2]
    assert pool.allocate(8, first[:2]) == first[:2] and pool.free_pages == 0


def test_a_pool_keeps_no_more_idle_pages_than_it_may():
    pool = PagePool(8, 4, most_kept=2)
    pages = pool.allocate(16)
    pool.prefixes.add(TEXT[:16], pages)
    pool.keep([pages])
    assert pool.prefixes.find(TEXT) == pages
    pool.keep([])
    assert pool.prefixes.find(TEXT) == pages[:2]
    pool.forget()
    assert pool.prefixes.find(TEXT) == [] and pool.free_pages == 8


# ---- the decoder -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def target(request):
    return random_target("qwen3", request.param, "cpu", hidden=32, heads=2, kv_heads=1, layers=2)


def finished(decoder, request):
    """The event of a request's end, with all of its tokens."""
    decoder.submit(request)
    return ends(decoder)[request.id]


def ends(decoder):
    found, tokens = {}, {}
    while decoder._requests:
        for event in decoder.step():
            assert event.error is None
            tokens.setdefault(event.id, []).extend(event.tokens)
            if event.finish:
                found[event.id] = (tokens[event.id], event)
    return found


def kv_of(decoder, pages, tokens):
    """K and V of the first tokens in these pages, of every layer of target and drafter."""
    return [x[pages].flatten(0, 1)[:tokens] for caches in decoder.kv for cache in caches for x in (cache.k, cache.v)]


def poisoned(decoder):
    for caches in decoder.kv:
        for cache in caches:
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))
    return decoder


@pytest.mark.parametrize("way", ["baseline", "blocks", "chosen", "drawn"])
def test_p19_a_conversation_goes_on_from_its_pages(target, way):
    options = {"block_size": 4} if way == "blocks" else {"sample_from": "request"} if way == "drawn" else {}
    sampling = SamplingParams(0.8, seed=3) if way == "drawn" else SamplingParams()

    def made(**more):
        drafter = None if way == "baseline" else Drafter.random(target, num_layers=2, block_size=4)
        return poisoned(Decoder(target, drafter, max_batch=2, **OPTIONS, **options, **more))

    kept, prompt = made(), [5, 9, 33, 2, 71]
    for turn, cached in enumerate((0, 8, 20)):
        fresh = made(reuse=False)
        (text, end), (want, wanted) = (finished(d, Request(turn, prompt, 7, (), sampling)) for d in (kept, fresh))
        assert text == want and end.cached_tokens == cached and wanted.cached_tokens == 0
        if way != "chosen":  # by measured time
            assert end.acceptance_lengths == wanted.acceptance_lengths
        done = [*prompt, *text[:-1]]
        full = len(done) // 4 * 4
        pages = kept.pool.prefixes.find(done)
        assert len(pages) == full // 4
        # A prompt's pass over the whole text, in another decoder, gives the same K/V.
        again = made()
        finished(again, Request(turn, [*done, 1], 1))
        for x, y in zip(kv_of(kept, pages, full), kv_of(again, again.pool.prefixes.find(done), full), strict=True):
            assert not x.isnan().any() and same_bits(x, y)
        prompt = [*prompt, *text, 4 + turn, 50, 60, 70, 80]
    assert kept.pool.free_pages == kept.pool.num_pages


def test_choices_of_one_prompt_read_it_once(target):
    decoder = Decoder(target, Drafter.random(target, 2, 4), max_batch=4, **OPTIONS)
    for i in range(3):
        decoder.submit(Request(i, TEXT[:22], 5, (), SamplingParams(0.9, seed=i)))
    found = ends(decoder)
    assert [found[i][1].cached_tokens for i in range(3)] == [0, 20, 20]
    for i in range(3):
        alone = Decoder(target, None, max_batch=1, **OPTIONS)
        assert finished(alone, Request(0, TEXT[:22], 5, (), SamplingParams(0.9, seed=i)))[0] == found[i][0]


def test_a_prompt_that_is_known_to_its_end_runs_its_last_token(target):
    decoder = Decoder(target, None, max_batch=1, **OPTIONS)
    texts = [finished(decoder, Request(i, TEXT[:20], 6)) for i in range(2)]
    assert texts[0][0] == texts[1][0] and [end.cached_tokens for _, end in texts] == [0, 16]


def test_requests_of_another_salt_find_nothing(target):
    decoder = Decoder(target, None, max_batch=1, **OPTIONS)
    cached = [finished(decoder, Request(i, TEXT[:20], 2, cache_salt=salt))[1].cached_tokens
              for i, salt in enumerate(["", "a", "b", "a", ""])]
    assert cached == [0, 0, 0, 16, 16]
    with pytest.raises(TypeError, match="cache_salt must be a text; got 3"):
        decoder.submit(Request(9, [1], 1, cache_salt=3))


def test_nothing_is_found_after_the_end(target):
    decoder = Decoder(target, None, max_batch=1, **OPTIONS)
    finished(decoder, Request(0, TEXT[:20], 2))
    decoder.close()
    assert finished(decoder, Request(1, TEXT[:20], 2))[1].cached_tokens == 0


def test_targets_whose_rows_depend_on_others_share_nothing(target, monkeypatch):
    monkeypatch.setattr(type(target), "reuses", False)
    decoder = Decoder(target, None, max_batch=1, **OPTIONS)
    assert [finished(decoder, Request(i, TEXT[:20], 2))[1].cached_tokens for i in range(2)] == [0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_any_requests_have_the_texts_that_they_have_alone(target, seed):
    """Requests that branch off from one another, in a pool that has room for few, some of whom leave."""
    dice = random.Random(seed)
    drafter = Drafter.random(target, 2, 4)
    decoder = poisoned(Decoder(target, drafter, max_batch=3, num_pages=24, **OPTIONS))
    if seed % 2:
        decoder.runner.policy = FixedWidths(3)
    texts, wanted, found, tokens, cached = [[1, 2, 3]], {}, {}, {}, 0
    for i in range(40):
        begun = dice.choice(texts)
        most = min(len(begun), 40)
        prompt = [*begun[:dice.randint(most // 2, most)], *(dice.randrange(VOCAB) for _ in range(dice.randint(1, 8)))]
        sampling = SamplingParams(0.9, seed=i) if i % 3 else SamplingParams()
        wanted[i] = Request(i, prompt, dice.randint(1, 10), (), sampling, cache_salt=dice.choice(["", "", "", "a"]))
        decoder.submit(wanted[i])
        for _ in range(dice.randint(0, 6)):
            for event in decoder.step():
                tokens.setdefault(event.id, []).extend(event.tokens)
                if event.finish in ("stop", "length"):
                    found[event.id] = tokens[event.id]
                    cached += event.cached_tokens
                    texts.append([*wanted[event.id].prompt, *found[event.id]])
            shared = [page for live in decoder._requests if not live.finish for page in live.pages]
            known = decoder.pool.prefixes.pages()
            assert all(page in known for page in shared if shared.count(page) > 1)
        if dice.random() < 0.1:
            decoder.cancel(i)
    for key, (rest, end) in ends(decoder).items():
        cached += end.cached_tokens
        if end.finish == "length":
            found[key] = [*tokens.get(key, []), *rest]
    assert len(found) >= 30 and cached >= 60
    alone = Decoder(target, None, max_batch=1, **OPTIONS, reuse=False)
    for i, text in found.items():
        assert finished(alone, wanted[i])[0] == text
    assert decoder.pool.free_pages == 24
