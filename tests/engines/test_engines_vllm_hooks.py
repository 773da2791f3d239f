"""What vLLM's hooks compute, and what they leave, against a small stand-in with its names, layouts and roundings."""

import gc
import logging
import types

import pytest
import torch

from dflash_engines import vllm as plugin
from dflash_engines.hooks import LEFT
from dflash_engines.vllm import context, head, verify
from tests.support import fake_vllm as fake


@pytest.fixture
def engine(monkeypatch):
    """With a proposer made, as the engine makes it: the hooks of the V1 runner are in place."""
    model, proposer, sampler = fake.install(monkeypatch)
    plugin.register()
    runner = fake.Runner()
    fake.make(proposer, runner=runner)
    return types.SimpleNamespace(model=model, proposer=proposer, sampler=sampler, runner=runner)


def _context(tokens=5, dtype=torch.float32):
    return (torch.randn(tokens, fake.HIDDEN).to(dtype), torch.arange(7, 7 + tokens),
            torch.tensor([9, 3, -1, 22, 1, 8, 14][:tokens]))


@pytest.mark.parametrize("changes", [{}, {"neox": False}, {"v_scale": 0.7}, {"dtype": torch.bfloat16},
                                     {"heads_first": False}], ids=str)
@pytest.mark.parametrize("per_layer", [False, True])
def test_context_kv_writes_what_the_original_writes(engine, changes, per_layer):
    ours, theirs = engine.model(**changes), fake.DFlashQwen3Model(**changes)
    states, positions, slots = _context(dtype=changes.get("dtype", torch.float32))
    slots = [slots, slots.flip(0), slots + 1] if per_layer else slots
    for model in (ours, theirs):
        model.precompute_and_store_context_kv(states, positions, slots)
    assert ours.calls == 0 and theirs.calls == 1
    for a, b in zip(ours._attn_layers, theirs._attn_layers, strict=True):
        assert b.kv_cache.any()
        # The last bit may differ: float32 sums in another order.
        torch.testing.assert_close(a.kv_cache, b.kv_cache)


def test_context_kv_again_and_of_more_tokens_than_are_kept(engine):
    ours, theirs = engine.model(), fake.DFlashQwen3Model()
    for tokens in (5, 3, 70, 5):
        slots = torch.full((tokens,), -1)
        slots[-2:] = torch.randperm(fake.PAGES * fake.PAGE)[:2]
        states, positions = torch.randn(tokens, fake.HIDDEN), torch.arange(tokens) % 60
        for model in (ours, theirs):
            model.precompute_and_store_context_kv(states, positions, slots)
        for a, b in zip(ours._attn_layers, theirs._attn_layers, strict=True):
            torch.testing.assert_close(a.kv_cache, b.kv_cache)
    assert len(ours._dflash_context_kv[0].rows.views) == 2


@pytest.mark.parametrize("heads_first", [False, True])
def test_context_kv_goes_straight_into_interleaved_caches(engine, heads_first):
    """As on a GPU, where keys and values of a head lie side by side; here on a CPU's tensors."""
    ours, theirs = engine.model(heads_first=heads_first), fake.DFlashQwen3Model(heads_first=heads_first)
    states, positions, slots = _context()
    made = context.decide(ours)
    caches = [context.paged(layer.kv_cache, fake.HEAD_DIM) for layer in ours._attn_layers]
    assert caches[0].v.data_ptr() - caches[0].k.data_ptr() == fake.HEAD_DIM * 4  # views
    context.write(ours, made, context.project(ours, states), positions, slots, caches)
    theirs.precompute_and_store_context_kv(states, positions, slots)
    for a, b in zip(ours._attn_layers, theirs._attn_layers, strict=True):
        torch.testing.assert_close(a.kv_cache, b.kv_cache)


SCALES = [(0.5, 0.02), (0.03, 2.0), (1.0, 0.25)]  # of each layer: far from each other, and from 1


def split(backend, **changes):
    """A model whose layers have interleaved pages, as a GPU's backends."""
    def make(cls):
        model = cls(**changes)
        for layer in model._attn_layers:
            layer.attn_backend = type("Backend", (fake.Backend,), {"name": backend})
        return model

    return make


def caches(model):
    return [layer.kv_cache for layer in model._attn_layers]


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "FLASHINFER"])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_context_kv_writes_fp8_caches_with_the_scales_of_each_layer(engine, backend, heads_first, per_layer):
    """In one call of the op, the engine's bytes."""
    make = split(backend, scales=SCALES, heads_first=heads_first, v_scale=0.7, dtype=torch.bfloat16)
    ours, theirs = make(engine.model), make(fake.DFlashQwen3Model)
    states, positions, slots = _context(dtype=torch.bfloat16)
    slots = [slots, slots.flip(0), slots + 1] if per_layer else slots
    for model in (ours, theirs):
        model.precompute_and_store_context_kv(states, positions, slots)
    assert ours.calls == 0
    for i, (a, b) in enumerate(zip(caches(ours), caches(theirs), strict=True)):
        assert b.any() and (a != b).float().mean() < 0.002, i  # sums of squares in another order
    for wrong in ([SCALES[0]] * 3, SCALES[::-1], [(v, k) for k, v in SCALES]):  # none of these would pass
        other = split(backend, scales=wrong, heads_first=heads_first, v_scale=0.7, dtype=torch.bfloat16)(engine.model)
        other.precompute_and_store_context_kv(states, positions, slots)
        assert any((a != b).float().mean() > 0.02 for a, b in zip(caches(other), caches(theirs), strict=True))


@pytest.mark.parametrize("backend, dtype", [("CPU_ATTN", torch.bfloat16), ("FLASH_ATTN", torch.float32)])
def test_context_kv_scales_each_layers_values_by_its_own(engine, backend, dtype):
    """The engine takes the first layer's for all. Layer i is compared with a model that has its scale everywhere."""
    factors = [0.7, None, 3.0]
    ours, (states, positions, slots) = split(backend, v_scale=factors, dtype=dtype)(engine.model), _context(dtype=dtype)
    ours.precompute_and_store_context_kv(states, positions, slots)
    assert ours.calls == 0
    for i, factor in enumerate(factors):
        theirs = split(backend, v_scale=factor, dtype=dtype)(fake.DFlashQwen3Model)
        theirs.precompute_and_store_context_kv(states, positions, slots)
        torch.testing.assert_close(caches(ours)[i], caches(theirs)[i])
        v = caches(theirs)[i][..., fake.HEAD_DIM:]
        assert torch.equal(caches(ours)[i][..., fake.HEAD_DIM:], v) and v.any()


@pytest.mark.parametrize("change, why", [
    ({"kv_cache_dtype": "fp8_e5m2"}, "a cache of torch.uint8"), ({"kv_cache_dtype": "nvfp4"}, "a cache of torch.uint8"),
    ({"attn_backend": fake.Backend}, "a cache of torch.float8_e4m3fn for a model of torch.bfloat16")])
def test_context_kv_leaves_other_8_bit_caches(engine, caplog, change, why):
    """Two of another format, and one in tiles, which the engine would have to write."""
    model = split("FLASH_ATTN", scales=SCALES, dtype=torch.bfloat16)(engine.model)
    for layer in model._attn_layers:
        vars(layer).update(change)
    with caplog.at_level(logging.INFO):
        model.precompute_and_store_context_kv(*_context(dtype=torch.bfloat16))
    assert model.calls == 1 and why in caplog.text


def test_context_kv_finds_fp8_caches_that_moved(engine):
    model = split("FLASH_ATTN", scales=SCALES, dtype=torch.bfloat16)(engine.model)
    given = _context(dtype=torch.bfloat16)
    model.precompute_and_store_context_kv(*given)
    before = [cache.clone() for cache in caches(model)]
    for layer in model._attn_layers:
        layer.kv_cache = torch.zeros_like(layer.kv_cache)
    model.precompute_and_store_context_kv(*given)
    assert all(map(torch.equal, caches(model), before)) and model.calls == 0


def test_context_kv_leaves_to_the_original(engine, caplog):
    states, positions, slots = _context()
    model = engine.model()
    model.precompute_and_store_context_kv(states, positions)  # measuring memory
    model.precompute_and_store_context_kv(states, positions, [slots, None, slots])
    assert model.calls == 2 and not hasattr(model, "_dflash_context_kv")

    class Own(engine.model):
        def _normalize_context_k(self, k):
            return super()._normalize_context_k(k)

    cases = [(engine.model(method="dspark"), {}, "the drafter of dspark"),
             (Own(), {}, "Own normalises in its own way"), (engine.model(), {"_rope_head_size": 8}, "RoPE over 8"),
             (engine.model(), {"_attn_layers": [fake.Layer(torch.float8_e4m3fn, True)] * 3}, "a cache of torch.float8")]
    shared = [types.SimpleNamespace(**vars(layer), attn_backend=fake.Backend, kv_sharing_target_layer_name="0")
              for layer in model._attn_layers]
    cases.append((engine.model(), {"_attn_layers": shared}, "layers that share a cache"))
    for model, changes, why in cases:
        vars(model).update(changes)
        with caplog.at_level(logging.INFO):
            model.precompute_and_store_context_kv(states, positions, torch.full_like(slots, -1))
        assert model.calls == 1 and why in caplog.text


@pytest.mark.parametrize("change", [
    lambda states, positions, slots: (states[None], positions, slots),
    lambda states, positions, slots: (states.double(), positions, slots),
    lambda states, positions, slots: (states[:, :-1], positions, slots),
    lambda states, positions, slots: (states, positions[None], slots),
    lambda states, positions, slots: (states, positions.int(), slots),
    lambda states, positions, slots: (states, positions, slots[:-1]),
    lambda states, positions, slots: (states, positions, slots.int()),
    lambda states, positions, slots: (states, positions, [slots, slots])])
def test_context_kv_leaves_what_it_was_not_written_for(engine, change):
    model = engine.model()
    assert context.precompute_and_store_context_kv(model, *_context()) is not LEFT
    assert context.precompute_and_store_context_kv(model, *change(*_context())) is LEFT


def test_draft_head_leaves_what_it_was_not_written_for(engine):
    proposer = fake.make(engine.proposer)
    assert head._greedy_sample(proposer, torch.randn(2, fake.HIDDEN)) is not LEFT
    for hidden in (torch.randn(1, 2, fake.HIDDEN), torch.randn(fake.HIDDEN), torch.randn(2, fake.HIDDEN).double()):
        assert head._greedy_sample(proposer, hidden) is LEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_vocabulary", [False, True])
def test_draft_head(engine, dtype, own_vocabulary):
    offsets = torch.arange(fake.VOCAB) * 2 if own_vocabulary else None
    proposer = fake.make(engine.proposer, offsets, dtype)
    hidden = torch.randn(9, fake.HIDDEN).to(dtype)
    expected = proposer.model.compute_logits(hidden).argmax(-1)
    proposer.model.compute_logits = None  # no logits are made
    assert torch.equal(proposer._greedy_sample(hidden), expected)


def test_draft_head_is_packed_where_the_drafter_is_loaded_and_again_with_other_weights(engine):
    """The engine measures memory in between, and can load weights into the same tensor later."""
    proposer, hidden = fake.make(engine.proposer), torch.randn(9, fake.HIDDEN)
    proposer.model.lm_head.cpu_linear = object()
    proposer.load_model("a target")
    assert proposer.target_model == "a target" and isinstance(proposer._dflash_draft_head[0], head.Plan)
    first = proposer._greedy_sample(hidden)
    proposer.model.lm_head.weight.copy_(proposer.model.lm_head.weight.flip(0))
    proposer.model.lm_head.weight[fake.VOCAB:] = 0
    proposer.model.lm_head.cpu_linear = object()  # as the engine's own head is made anew
    expected = proposer.model.compute_logits(hidden).argmax(-1)
    assert torch.equal(proposer._greedy_sample(hidden), expected) and not torch.equal(first, expected)


def test_a_drafter_that_draft_head_cannot_serve_is_loaded_all_the_same(engine):
    proposer = fake.make(engine.proposer)
    proposer.model.lm_head.weight = None
    proposer.load_model("a target")
    assert proposer.target_model == "a target"


@pytest.mark.parametrize("changes, why", [
    ({"model__lm_head__tp_size": 2}, "a vocabulary shared out over 2 ranks"),
    ({"use_heterogeneous_vocab": True}, "a mapping between two tokenizers"),
    ({"model__logits_processor__soft_cap": 30.0}, "scaled or capped logits"),
    ({"model__logits_processor__head_dtype": torch.bfloat16}, "a head of torch.bfloat16"),
    ({"model__lm_head__quant_method": types.SimpleNamespace()}, "a head of SimpleNamespace"),
    ({"model__draft_id_to_target_id": -2 * torch.arange(fake.VOCAB)}, "not in the target's order"),
])
def test_draft_head_leaves_to_the_original(engine, caplog, changes, why):
    proposer = fake.make(engine.proposer, **changes)
    proposer.model.compute_logits = lambda hidden: torch.nn.functional.one_hot(torch.tensor([4, 2]))
    with caplog.at_level(logging.INFO):
        assert proposer._greedy_sample(torch.randn(2, fake.HIDDEN)).tolist() == [4, 2]
    assert why in caplog.text


def _verification(requests, drafted, accepted, runner=None):
    logits = torch.randn(requests * drafted, fake.VOCAB)
    drafts = logits.argmax(-1).view(requests, drafted)
    for b, n in enumerate(accepted):
        if n < drafted:
            drafts[b, n] = (drafts[b, n] + 1) % fake.VOCAB
    return [drafts.flatten().int(), [drafted] * requests, drafted, None, None, logits,
            torch.arange(requests).view(-1, 1) + 7, (runner or fake.Runner()).input_batch.sampling_metadata]


@pytest.mark.parametrize("drafted, accepted", [(1, [0, 1]), (3, [0, 1, 2, 3]), (7, [7, 6, 0, 5, 7])])
def test_verify(engine, drafted, accepted):
    args = _verification(len(accepted), drafted, accepted, engine.runner)
    found = engine.sampler.rejection_sample(*args)
    assert args[-1].calls == 0 and found.dtype == torch.int32
    assert torch.equal(found, fake.rejection_sample(*args))
    assert (found >= 0).sum(1).tolist() == [n + 1 for n in accepted]


def test_verify_refuses_drafts_that_are_no_tokens(engine):
    args = _verification(2, 3, [3, 3], engine.runner)
    args[0][:] = -1
    assert engine.sampler.rejection_sample(*args)[:, 1:].eq(-1).all() and args[-1].calls == 0


@pytest.mark.parametrize("change", ["sampled", "ragged", "synthetic", "fly", "none drafted", "bonus (B,)",
                                    "wide logits", "drafts (B, S)", "float drafts", "half logits", "a row too many"])
def test_verify_leaves_to_the_original(engine, change):
    """What its own function takes, and ours was not written for: the answer is the engine's, and the hook stays on."""
    args, more = _verification(2, 3, [1, 3], engine.runner), {}
    if change == "sampled":
        args[-1].all_greedy = False
    elif change == "ragged":
        args[0], args[1], args[5] = args[0][:5], [2, 3], args[5][:5]
    elif change == "none drafted":
        args[0], args[1], args[2], args[5] = args[0][:0], [0, 0], 0, args[5][:0]
    elif change == "bonus (B,)":
        args[6] = args[6][:, 0]
    elif change == "wide logits":
        args[5] = torch.cat([args[5], args[5]], 1)[:, :fake.VOCAB]
    elif change == "half logits":
        args[5] = args[5].half()
    elif change == "drafts (B, S)":
        args[0] = args[0].view(2, 3)
    elif change == "float drafts":
        args[0] = args[0].float()
    elif change == "a row too many":
        args[5] = torch.cat([args[5], args[5][:1]])
    elif change in ("synthetic", "fly"):
        more = {"synthetic_mode": True} if change == "synthetic" else {"fly_window_size": 4}

    assert verify.rejection_sample(*args, **more) is LEFT


def test_verify_takes_a_bonus_of_either_shape_as_the_engine_does(engine):
    """(B,) was broadcast to (B, S + B) without a word."""
    args = _verification(2, 3, [1, 3], engine.runner)
    expected = fake.rejection_sample(*args)
    args[6] = args[6][:, 0]
    found = engine.sampler.rejection_sample(*args)
    assert found.shape == (2, 4) and torch.equal(found, expected) and args[-1].calls == 2


def test_verify_acts_for_dflash_alone(engine):
    """Another engine of this process, by another method, shares the function."""
    eagle = fake.Runner()
    for runner, calls in ((eagle, 1), (engine.runner, 0)):
        args = _verification(2, 3, [1, 3], runner)
        assert torch.equal(engine.sampler.rejection_sample(*args), fake.rejection_sample(*args))
        assert args[-1].calls == calls + 1  # the second is the test's own
    engine.runner.input_batch = fake.Runner().input_batch  # made anew
    args = _verification(2, 3, [1, 3], engine.runner)
    engine.sampler.rejection_sample(*args)
    assert args[-1].calls == 0


def test_runners_are_not_kept(engine):
    engine.runner = None
    gc.collect()
    assert not list(verify.RUNNERS)
