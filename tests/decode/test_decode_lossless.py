"""Speculative text equals baseline text, token for token, whatever the drafter guesses and whoever shares the batch."""

import random

import pytest
import torch

from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Request
from dflash_kernels import StepGraph
from dflash_kernels.testing import same_bits
from tests.support.decode_runs import PROMPTS, VOCAB, Oracle, collect, requests, run

pytest.importorskip("transformers")
from tests.support.decode_models import FAMILIES, baseline_text, make_target  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.mark.parametrize("family", FAMILIES)
def test_baseline_text_is_that_of_transformers(family):
    model, target = make_target(family)
    got = run(target, None, [Request(i, p, 6) for i, p in enumerate(PROMPTS)], max_batch=3, max_context=64)
    for i, prompt in enumerate(PROMPTS):
        assert got[i] == (baseline_text(model, prompt, 6), "length", (1,) * 5)


@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("max_batch", [1, 8])
def test_speculative_text_is_baseline_text(family, dtype, max_batch):
    _, target = make_target(family, dtype)
    baseline = run(target, None, requests(), max_context=80)
    assert {len(text) for text, _, _ in baseline.values()} == {1, 2, 13, 29, 30, 5, 17, 8}
    texts = {key: value[0] for key, value in baseline.items()}
    for drafter in (Drafter.random(target, num_layers=2, block_size=5), Oracle.knowing(target, texts, 0.3),
                    Oracle.knowing(target, texts, 0.0)):
        got = run(target, drafter, requests(), max_batch=max_batch, max_context=80)
        assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in baseline.items()}
        for text, _, acceptance in got.values():
            assert sum(acceptance) == len(text) - 1
        if isinstance(drafter, Oracle):
            seen = {a for _, _, acceptance in got.values() for a in acceptance}
            assert seen >= ({1, 2, 3, 4, 5, 6} if drafter.fault_rate else {6})


@pytest.mark.parametrize("block_size", [2, 3, 6])
def test_any_width_up_to_the_checkpoints(block_size):
    _, target = make_target("llama", torch.bfloat16)
    baseline = run(target, None, requests(), max_context=80)
    oracle = Oracle.knowing(target, {key: value[0] for key, value in baseline.items()}, 0.2)
    got = run(target, oracle, requests(), max_context=80, block_size=block_size)
    assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in baseline.items()}
    assert max(a for *_, acceptance in got.values() for a in acceptance) == block_size


def test_a_stop_token_ends_the_text_inside_an_accepted_block():
    _, target = make_target("llama")
    baseline = run(target, None, requests(), max_context=80)
    long = baseline[4][0]
    stop = next(t for i, t in enumerate(long) if i >= 3 and t not in long[:i])
    at = long.index(stop)
    want = {i: (text[:text.index(stop) + 1] if stop in text else text) for i, (text, *_) in baseline.items()}
    oracle = Oracle.knowing(target, {key: value[0] for key, value in baseline.items()}, 0.0)
    for drafter in (None, oracle):
        got = run(target, drafter, requests(stops={stop}), max_context=80)
        assert {key: value[0] for key, value in got.items()} == want
        assert got[4][:2] == (long[:at + 1], "stop")
        assert {value[1] for value in got.values()} == {"stop", "length"}


def test_many_requests_in_blocks_of_any_width():
    _, target = make_target("qwen3", torch.bfloat16)
    wanted = [Request(i, PROMPTS[i % len(PROMPTS)], 12 + 16 * (i < 2), ()) for i in range(32)]
    baseline = run(target, None, wanted, max_context=80, max_batch=32)
    oracle = Oracle.knowing(target, {key: value[0] for key, value in baseline.items()}, 0.0, block_size=8)
    for size in (None, 8):
        got = run(target, oracle, wanted, max_context=80, max_batch=32, block_size=size)
        assert {key: value[0] for key, value in got.items()} == {key: value[0] for key, value in baseline.items()}
    assert {value[2][0] for value in got.values()} == {8}


def test_requests_arrive_and_leave_at_any_step():
    _, target = make_target("qwen3", torch.bfloat16)
    wanted = requests()
    baseline = run(target, None, wanted, max_context=80)
    texts = {key: value[0] for key, value in baseline.items()}
    for seed in range(4):
        dice = random.Random(seed)

        def arriving(dice=dice):
            for request in dice.sample(wanted, len(wanted)):
                for _ in range(dice.randint(0, 3)):
                    yield None
                yield request

        oracle = Oracle.knowing(target, texts, 0.3, seed=seed)
        decoder = Decoder(target, oracle, max_batch=dice.randint(2, 5), max_context=80, page_size=4, prefill_rows=16)
        oracle.decoder, events, left = decoder, [], set()
        for event in decoder.stream(arriving()):
            events.append(event)
            if event.finish is None and dice.random() < 0.05:
                decoder.cancel(event.id)
                left.add(event.id)
        got = collect(events)
        assert set(got) == set(texts) and decoder.pool.free_pages == decoder.pool.num_pages
        for key, (text, finish, _) in got.items():
            assert finish == ("cancelled" if key in left and finish == "cancelled" else "length")
            assert text == (texts[key][:len(text)] if finish == "cancelled" else texts[key])


def test_few_pages_make_requests_wait_and_change_nothing():
    _, target = make_target("llama", torch.bfloat16)
    baseline = run(target, None, requests(), max_context=80)
    oracle = Oracle.knowing(target, {key: value[0] for key, value in baseline.items()}, 0.3)
    got = run(target, oracle, requests(), max_context=80, num_pages=20)
    assert {key: value[0] for key, value in got.items()} == {key: value[0] for key, value in baseline.items()}


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_page_size_changes_nothing(page_size):
    _, target = make_target("llama", torch.bfloat16)
    baseline = run(target, None, requests(), max_context=80)
    oracle = Oracle.knowing(target, {key: value[0] for key, value in baseline.items()}, 0.3)
    got = run(target, oracle, requests(), max_context=80, page_size=page_size)
    assert {key: value[0] for key, value in got.items()} == {key: value[0] for key, value in baseline.items()}


def test_one_bad_request_does_not_disturb_the_others():
    _, target = make_target("llama")
    bad = [Request("empty", [], 4), Request("long", [1] * 80, 4), Request("id", [VOCAB], 4), Request("none", [1], 0),
           Request("text", "hello", 4), Request(0, [1], 4)]
    good = requests()
    mixed = [good[0], bad[0], good[1], *bad[1:5], good[2], *good[3:]]
    decoder = Decoder(target, None, max_context=80)
    events = list(decoder.stream(mixed))
    errors = {event.id: event.error for event in events if event.finish == "error"}
    assert errors == {
        "empty": "request 'empty': prompt must have at least 1 token; got 0",
        "long": "request 'long': prompt must be shorter than the context of 80 tokens; got 80",
        "id": f"request 'id': prompt must hold token ids in [0, {VOCAB}); got {VOCAB}",
        "none": "request 'none': max_tokens must be an integer of at least 1; got 0",
        "text": "request 'text': prompt must be a sequence of token ids, or a tensor or array of one dimension; "
                "got 'hello'",
    }
    got = collect(event for event in events if event.finish != "error")
    assert got == run(target, None, good, max_context=80)
    decoder.submit(good[3])
    with pytest.raises(ValueError, match="request 3: id must be new"):
        decoder.submit(good[3])


def test_closing_the_stream_frees_every_page():
    _, target = make_target("llama")
    decoder = Decoder(target, Drafter.random(target, num_layers=2), max_context=80, max_batch=4)
    stream = decoder.stream(requests())
    for _ in range(7):
        next(stream)
    assert decoder.pool.free_pages < decoder.pool.num_pages
    stream.close()
    assert decoder.pool.free_pages == decoder.pool.num_pages

    def interrupted():
        yield requests()[4]
        yield requests()[5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(decoder.stream(interrupted()))
    assert decoder.pool.free_pages == decoder.pool.num_pages


def test_the_answer_ends_where_the_context_does():
    _, target = make_target("llama")
    got = run(target, Drafter.random(target, num_layers=2), [Request(0, [1] * 12, 100)], max_context=16)
    assert len(got[0][0]) == 4 and got[0][1] == "length"


def test_p19_a_page_used_before_carries_nothing_over():
    """The second request gets the pages of the first, full of its keys; its drafts are as if they were fresh."""
    _, target = make_target("llama")
    drafter = Drafter.random(target, num_layers=2, block_size=4)
    first, second = Request(0, [7] * 30, 20), Request(1, [3, 4, 5], 20)
    fresh = run(target, drafter, [second], max_batch=1, max_context=64)
    assert run(target, drafter, [first, second], max_batch=1, max_context=64, num_pages=13)[1] == fresh[1]


def cached(decoder, live):
    """The K/V of a request's context in every layer of both models, in token order."""
    decoder.runner.write_context([live])
    slots = torch.tensor([live.pages[t // 4] * 4 + t % 4 for t in range(live.context)])
    return [side.reshape(-1, *side.shape[2:])[slots]
            for caches in decoder.kv for cache in caches for side in (cache.k, cache.v)]


@pytest.mark.parametrize("fault", [False, True])
def test_p17_p19_caches_after_ragged_steps_are_those_of_one_prefill(fault, monkeypatch):
    """Text proves nothing about a drafter. Its context K/V, written block by block with rejected rows left out, must be
    what one prefill of the whole text writes, bit for bit; a commit one row too long must be seen."""
    _, target = make_target("qwen3", torch.bfloat16)
    baseline = run(target, None, requests(), max_context=80)
    texts = {key: value[0] for key, value in baseline.items()}
    oracle = Oracle.knowing(target, texts, 0.3)
    if fault:
        made = oracle.make_context

        def off_by_one(batch, width, caches):
            context = made(batch, width, caches)
            right = context.run
            context.run = lambda f, positions, *rest: right(f, positions + (width < 16), *rest)
            return context

        monkeypatch.setattr(oracle, "make_context", off_by_one)
    decoder = Decoder(target, oracle, max_context=80, page_size=4, prefill_rows=16, max_batch=8, block_size=6)
    oracle.decoder = decoder
    for cache in decoder.kv[1]:
        cache.k.fill_(float("nan"))
    for request in requests():
        decoder.submit(request)
    monkeypatch.setattr(Decoder, "_rows_beside_a_step", lambda self: 1000)  # all prompts at once
    for _ in range(4):
        decoder.step()
    assert len(decoder._active) >= 4
    differs = False
    for live in list(decoder._active):
        spare = torch.tensor([live.pages[t // 4] * 4 + t % 4 for t in range(live.context, 4 * len(live.pages))])
        for cache in decoder.kv[1] if not fault else ():
            assert cache.k.reshape(-1, *cache.k.shape[2:])[spare].isnan().all()
        text = [*live.request.prompt, *texts[live.request.id]][:live.context]
        once = Decoder(target, oracle, max_context=80, page_size=4, prefill_rows=64, max_batch=1)
        once.runner.setting.drafter = Drafter.random(target, num_layers=2, block_size=6)
        once.submit(Request("once", text, 2))
        once._start()
        pairs = zip(cached(decoder, live), cached(once, once._active[0]), strict=True)
        differs |= not all(same_bits(a, b) for a, b in pairs)
    assert differs == fault


def test_p20_replayed_steps_are_live_steps(monkeypatch):
    """Lengths, tables and batch membership change between replays."""
    _, target = make_target("llama", torch.bfloat16)
    drafter = Drafter.random(target, num_layers=2, block_size=5)
    replayed = run(target, drafter, requests(), max_batch=5, max_context=80)
    monkeypatch.setattr(StepGraph, "available", staticmethod(lambda device="cpu": False))
    assert run(target, drafter, requests(), max_batch=5, max_context=80) == replayed


def test_random_drafters_are_deterministic_and_their_target_layer_ids_fit():
    _, target = make_target("llama")
    one, two = (Drafter.random(target, seed=5) for _ in range(2))
    assert torch.equal(one.fc.data, two.fc.data)
    assert not torch.equal(one.fc.data, Drafter.random(target, seed=6).fc.data)
    assert one.target_layer_ids == (0, 1, 3)


@pytest.mark.parametrize(("options", "match"), [
    ({"block_size": 9}, "block_size must be between 1 and the drafter's 8; got 9"),
    ({"block_size": 0}, "block_size must be an integer of at least 1; got 0"),
    ({"max_batch": 0}, "max_batch must be an integer of at least 1; got 0"),
    ({"max_context": 0}, "max_context must be"), ({"page_size": 0}, "page_size must be"),
    ({"prefill_rows": 0}, "prefill_rows must be"), ({"num_pages": 0}, "num_pages must be"),
])
def test_sizes_of_a_decoder_are_checked(options, match):
    _, target = make_target("llama")
    with pytest.raises(ValueError, match=match):
        Decoder(target, Drafter.random(target), **options)
