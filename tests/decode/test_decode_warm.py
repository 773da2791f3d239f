"""What a decoder does before the first request: every size of pass and step, once; and how many pages it takes."""

import pytest
import torch

from dflash_decode import kv
from dflash_decode.kv import CacheShape, default_pages
from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Request
from dflash_decode.sampling import GREEDY, SamplingParams
from dflash_decode.step import Prefill
from dflash_decode.verify import AdjustedVerifier, GreedyVerifier, SampledVerifier
from dflash_kernels import StepGraph
from dflash_kernels.testing import same_bits
from tests.support.decode_runs import PROMPTS, collect, random_target, requests

SAMPLINGS = [GREEDY, SamplingParams(0.8, seed=1), SamplingParams(0.7, seed=2, logit_bias={3: 1.0}), GREEDY] * 2


@pytest.fixture(scope="module")
def target():
    return random_target("llama", torch.float32, "cpu", hidden=32, heads=2, kv_heads=1, layers=2)


def decoder_of(target, drafted=True, **options):
    drafter = Drafter.random(target, num_layers=2, block_size=4) if drafted else None
    return Decoder(target, drafter, **{"max_context": 80, "page_size": 4, "prefill_rows": 32, **options})


def made_by(decoder):
    return {name: set(getattr(decoder.runner, name)) for name in ("prefills", "verifies", "drafts", "contexts")} | {
        "firsts": set(decoder._firsts)}


def texts_of(found):
    return {key: value[:2] for key, value in found.items()}


def mixed():
    return [Request(r.id, r.prompt, r.max_tokens, (), s) for r, s in zip(requests(), SAMPLINGS, strict=True)]


@pytest.mark.parametrize("drafted", [True, False])
@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_after_warming_up_nothing_is_made_or_captured(target, drafted, max_batch, monkeypatch):
    """Whatever comes: every batch, verifier and length of prompt."""
    want = collect(decoder_of(target, drafted, max_batch=max_batch).stream(mixed()))
    decoder = decoder_of(target, drafted, max_batch=max_batch)
    decoder.warm_up()
    made = made_by(decoder)
    assert {kind for *_, kind in made["verifies"]} == {GreedyVerifier, SampledVerifier, AdjustedVerifier}
    assert made["prefills"] == {16, 32} and bool(made["drafts"]) == bool(made["contexts"]) == drafted
    assert decoder.pool.free_pages == decoder.pool.num_pages and not decoder._requests

    def refused(*_):
        raise AssertionError("captured after the decoder was warm")

    monkeypatch.setattr(StepGraph, "capture", refused)
    for name in ("VerifyStage", "DraftStage", "ContextStage", "Prefill"):
        monkeypatch.setattr(f"dflash_decode.packed_runner.{name}", refused)
    assert texts_of(collect(decoder.stream(mixed()))) == texts_of(want)
    assert made_by(decoder) == made


def test_logits_of_all_widths_are_in_the_same_memory(target):
    """Each has a size of its own, and a vocabulary's many rows would add up."""
    decoder = decoder_of(target, max_batch=3)
    decoder.warm_up()
    of = {kind: [stage.verifier for key, stage in decoder.runner.verifies.items() if key[-1] is kind]
          for kind in (SampledVerifier, AdjustedVerifier)}
    assert min(map(len, of.values())) > 3
    every = [verifier for some in of.values() for verifier in some]
    assert len({verifier.logits.untyped_storage().data_ptr() for verifier in every}) == 1
    assert len({verifier.adjuster.bias.untyped_storage().data_ptr() for verifier in of[AdjustedVerifier]}) == 1


def test_warming_up_for_some_prompts_and_settings_makes_what_they_need(target):
    decoder = decoder_of(target, max_batch=2)
    decoder.ready()
    measured = set(decoder.runner.verifies)
    assert measured and {kind for *_, kind in measured} == {GreedyVerifier} and not decoder.runner.prefills
    decoder.warm_up([5, 40], [SamplingParams(0.8)])
    made = made_by(decoder)
    assert made["verifies"] - measured == {(b, 0, width, SampledVerifier) for b in (1, 2) for width in range(1, 5)}
    assert made["prefills"] == {16, 32}
    decoder.warm_up([5], [GREEDY])
    made = made_by(decoder)
    decoder.warm_up([5, 40], [GREEDY, SamplingParams(0.8)])
    assert made_by(decoder) == made
    short = decoder_of(target, max_context=10)
    short.warm_up()
    assert set(short.runner.prefills) == {16}


@pytest.mark.parametrize("drafter", ["adapts", "fixed", "none"])
@pytest.mark.parametrize("requests", [1, 2])
def test_a_ready_decoder_records_no_more_steps(target, drafter, requests):
    """Neither for one request nor for a full batch, unless very many drafts pay."""
    block = {"block_size": 3} if drafter == "fixed" else {}
    decoder = decoder_of(target, drafter != "none", max_batch=2, **block)
    decoder.ready()

    def recorded():
        usual = [stage for stage in decoder.runner.verifies.values() if requests == 1 or stage.rows <= 2 * requests]
        return [stage for stage in (*usual, *decoder.runner.drafts.values()) if stage.work.graph.captured]

    before = recorded()
    assert len(before) >= 2
    for i, prompt in enumerate([[5], [9]][:requests]):
        decoder.submit(Request(i, prompt, 50))
    for _ in range(8):
        decoder.step()
    assert sum(not live.finish for live in decoder._requests) == requests and recorded() == before


def test_warming_up_while_requests_run_changes_no_text(target):
    want = {key: value[0] for key, value in collect(decoder_of(target).stream(mixed())).items()}
    decoder, texts = decoder_of(target, max_batch=8), {}
    for request in mixed():
        decoder.submit(request)
    for step in range(100):
        if step == 2:
            decoder.warm_up()
        for event in decoder.step():
            texts.setdefault(event.id, []).extend(event.tokens)
    assert texts == want


def test_warming_up_writes_no_key_and_asks_no_grammar(target):
    class Never:
        def fill_bitmask(self, tokens, words):
            raise AssertionError("asked")

    decoder = decoder_of(target)
    caches = [t for caches in decoder.kv for cache in caches for t in (cache.k, cache.v)]
    for t in caches:
        t.fill_(float("nan"))
    before = [t.clone() for t in caches]
    decoder.warm_up(samplings=[SamplingParams(grammar=Never())])
    assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(caches, before, strict=True))


def test_a_session_decodes_no_prompt_twice(models, monkeypatch):
    from dflash_decode.session import Session

    session, passes = Session.load(models["model"], models["draft"], dtype="float32"), []
    run = Prefill.run
    monkeypatch.setattr(Prefill, "run", lambda self: (passes.append(self.block_lens.tolist()), run(self)))
    monkeypatch.setattr(StepGraph, "available", staticmethod(lambda device="cpu": False))
    session.run([PROMPTS[1], PROMPTS[2]], max_tokens=4, concurrency=2)
    assert passes == [[len(PROMPTS[1])], [len(PROMPTS[2])]]


# ---- pages ---------------------------------------------------------------------------------------------------------


def gpu(monkeypatch, free, reserved=0, allocated=0):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: allocated)


LLAMA_8B = CacheShape(32, 8, 128, torch.bfloat16, "cuda")


def test_pages_on_a_gpu_are_what_its_free_memory_holds(monkeypatch):
    """max_batch x max_position of Llama-3.1-8B would be 137 GB."""
    most, free = 8 * 131_072 // 64, 60 * 10**9
    assert LLAMA_8B.page_bytes(64) == 8 << 20 and most * LLAMA_8B.page_bytes(64) == 137_438_953_472
    gpu(monkeypatch, free)
    pages = default_pages(most, 64, [LLAMA_8B])
    assert pages == 48 * 10**9 // (8 << 20)
    drafter = CacheShape(5, 8, 128, torch.bfloat16, "cuda")
    both = default_pages(most, 64, [LLAMA_8B, drafter])
    assert both == 48 * 10**9 // ((8 << 20) * 37 // 32) < pages
    assert default_pages(100, 64, [LLAMA_8B]) == 100  # no more than requests can use
    gpu(monkeypatch, free - 10**9, reserved=3 * 10**9, allocated=2 * 10**9)  # of which torch holds some, unused
    assert default_pages(most, 64, [LLAMA_8B]) == pages
    gpu(monkeypatch, 10**6)
    with pytest.raises(ValueError, match="num_pages must be what cuda has room for; got 1000000 free bytes"):
        default_pages(most, 64, [LLAMA_8B])


def test_pages_on_a_cpu_are_for_everybody(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: 1 / 0)
    assert default_pages(16_384, 64, [CacheShape(32, 8, 128, torch.bfloat16)]) == 16_384
    assert kv.PagePool(16_384, 64).free_pages == 16_384
