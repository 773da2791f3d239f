"""vLLM's plugin without vLLM: the hooks against a small stand-in with its names, layouts and roundings."""

import ast
import functools
import inspect
import logging
import sys
import types

import fake_vllm as fake
import pytest
import torch
from engine_files import FOLDER

import dflash_kernels
from dflash_decode.engines import vllm as plugin
from dflash_decode.engines.vllm import context, head, verify


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model, proposer, sampler = fake.install(monkeypatch)
    outcomes = plugin.register()
    assert [(o.name, o.why) for o in outcomes] == [
        ("context_kv", ""), ("attention", "slower than the engine's own on a CPU"), ("draft_head", ""), ("verify", ""),
        ("verify_v2", "not run on a GPU yet")]
    return model, proposer, sampler


def test_registering_twice_and_turning_off(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model, proposer, sampler = fake.install(monkeypatch)
    monkeypatch.setenv("DFLASH_VLLM_DISABLE", "verify")
    with caplog.at_level(logging.INFO):
        first, second = plugin.register(), plugin.register()
    assert first == second and [o.name for o in first if o.why] == ["attention", "verify", "verify_v2"]
    assert sampler.rejection_sample is fake.rejection_sample
    assert not hasattr(fake.SpecDecodeBaseProposer._greedy_sample, "dflash_original")  # other methods' proposers
    assert "verify: left, disabled by DFLASH_VLLM_DISABLE" in caplog.text


def test_without_the_engine_or_with_a_later_one(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert plugin.register() == [] and "nothing replaced" in caplog.text
    fake.install(monkeypatch, "0.34.0")
    monkeypatch.setenv("DFLASH_VLLM_ENABLE", "attention,verify_v2")
    assert all("version 0.34.0 is not of 0.32 to before 0.34" in o.why for o in plugin.register())


@pytest.mark.parametrize("name", [hook.name for hook in plugin.hooks()])
@pytest.mark.parametrize("change", ["one more", "one less", "renamed"])
def test_a_changed_signature_leaves_that_hook_alone(monkeypatch, caplog, name, change):
    fake.install(monkeypatch, device="cuda" if name == "verify_v2" else "cpu")
    monkeypatch.setenv("DFLASH_VLLM_ENABLE", "attention,verify_v2")
    module, _, path = next(hook.target for hook in plugin.hooks() if hook.name == name).partition(":")
    *owners, attribute = path.split(".")
    owner = functools.reduce(getattr, owners, sys.modules[module])
    found = list(inspect.signature(getattr(owner, attribute)).parameters)
    names = {"one more": [*found, "tree_mask"], "one less": found[:-1], "renamed": ["states", *found[1:]]}[change]
    of_class = isinstance(inspect.getattr_static(owner, attribute), classmethod)

    def changed(*args):
        return "theirs"

    changed.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD)
                                               for n in ["cls"] * of_class + names])
    setattr(owner, attribute, classmethod(changed) if of_class else changed)
    with caplog.at_level(logging.INFO):
        outcomes = {o.name: o.why for o in plugin.register()}
    assert outcomes.pop(name).startswith("its parameters changed: with")
    assert f"{name}: left, its parameters changed" in caplog.text
    assert getattr(owner, attribute)(*names) == "theirs"  # the engine's own, as it was
    assert not any("parameters" in why for why in outcomes.values())  # the others do not care


def _context(tokens=5, dtype=torch.float32):
    return (torch.randn(tokens, fake.HIDDEN).to(dtype), torch.arange(7, 7 + tokens),
            torch.tensor([9, 3, -1, 22, 1, 8, 14][:tokens]))


@pytest.mark.parametrize("changes", [{}, {"neox": False}, {"v_scale": 0.7}, {"dtype": torch.bfloat16},
                                     {"heads_first": False}], ids=str)
@pytest.mark.parametrize("per_layer", [False, True])
def test_context_kv_writes_what_the_original_writes(engine, changes, per_layer):
    ours, theirs = engine[0](**changes), fake.DFlashQwen3Model(**changes)
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
    ours, theirs = engine[0](), fake.DFlashQwen3Model()
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
    ours, theirs = engine[0](heads_first=heads_first), fake.DFlashQwen3Model(heads_first=heads_first)
    states, positions, slots = _context()
    made = context.decide(ours)
    caches = context.views([layer.kv_cache for layer in ours._attn_layers], fake.HEAD_DIM)
    assert caches[0].v.data_ptr() - caches[0].k.data_ptr() == fake.HEAD_DIM * 4  # views
    context.write(ours, made, context.project(ours, states), positions, slots, caches)
    theirs.precompute_and_store_context_kv(states, positions, slots)
    for a, b in zip(ours._attn_layers, theirs._attn_layers, strict=True):
        torch.testing.assert_close(a.kv_cache, b.kv_cache)


def test_context_kv_leaves_to_the_original(engine, caplog):
    states, positions, slots = _context()
    model = engine[0]()
    model.precompute_and_store_context_kv(states, positions)  # measuring memory
    model.precompute_and_store_context_kv(states, positions, [slots, None, slots])
    assert model.calls == 2 and not hasattr(model, "_dflash_context_kv")

    class Own(engine[0]):
        def _normalize_context_k(self, k):
            return super()._normalize_context_k(k)

    cases = [(Own(), {}, "Own normalises in its own way"), (engine[0](), {"_rope_head_size": 8}, "RoPE over 8"),
             (engine[0](), {"_attn_layers": [fake.Layer(torch.float8_e4m3fn, True)] * 3}, "a cache of torch.float8")]
    shared = [types.SimpleNamespace(**vars(layer), kv_sharing_target_layer_name="0") for layer in model._attn_layers]
    cases.append((engine[0](), {"_attn_layers": shared}, "layers that share a cache"))
    for model, changes, why in cases:
        vars(model).update(changes)
        with caplog.at_level(logging.INFO):
            model.precompute_and_store_context_kv(states, positions, torch.full_like(slots, -1))
        assert model.calls == 1 and why in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_vocabulary", [False, True])
def test_draft_head(engine, dtype, own_vocabulary):
    offsets = torch.arange(fake.VOCAB) * 2 if own_vocabulary else None
    proposer = engine[1](offsets, dtype)
    hidden = torch.randn(9, fake.HIDDEN).to(dtype)
    expected = proposer.model.compute_logits(hidden).argmax(-1)
    proposer.model.compute_logits = None  # no logits are made
    assert torch.equal(proposer._greedy_sample(hidden), expected)


@pytest.mark.parametrize("changes, why", [
    ({"model__lm_head__tp_size": 2}, "a vocabulary shared out over 2 ranks"),
    ({"use_heterogeneous_vocab": True}, "a mapping between two tokenizers"),
    ({"model__logits_processor__soft_cap": 30.0}, "scaled or capped logits"),
    ({"model__logits_processor__head_dtype": torch.bfloat16}, "a head of torch.bfloat16"),
    ({"model__lm_head__quant_method": types.SimpleNamespace()}, "a head of SimpleNamespace"),
    ({"model__draft_id_to_target_id": -2 * torch.arange(fake.VOCAB)}, "not in the target's order"),
])
def test_draft_head_leaves_to_the_original(engine, caplog, changes, why):
    proposer = engine[1](**changes)
    proposer.model.compute_logits = lambda hidden: torch.nn.functional.one_hot(torch.tensor([4, 2]))
    with caplog.at_level(logging.INFO):
        assert proposer._greedy_sample(torch.randn(2, fake.HIDDEN)).tolist() == [4, 2]
    assert why in caplog.text


def _verification(requests, drafted, accepted):
    logits = torch.randn(requests * drafted, fake.VOCAB)
    drafts = logits.argmax(-1).view(requests, drafted)
    for b, n in enumerate(accepted):
        if n < drafted:
            drafts[b, n] = (drafts[b, n] + 1) % fake.VOCAB
    metadata = types.SimpleNamespace(all_greedy=True, calls=0)
    return [drafts.flatten().int(), [drafted] * requests, drafted, None, None, logits,
            torch.arange(requests).view(-1, 1) + 7, metadata]


@pytest.mark.parametrize("drafted, accepted", [(1, [0, 1]), (3, [0, 1, 2, 3]), (7, [7, 6, 0, 5, 7])])
def test_verify(engine, drafted, accepted):
    args = _verification(len(accepted), drafted, accepted)
    found = engine[2].rejection_sample(*args)
    assert args[-1].calls == 0 and found.dtype == torch.int32
    assert torch.equal(found, fake.rejection_sample(*args))
    assert (found >= 0).sum(1).tolist() == [n + 1 for n in accepted]


def test_verify_refuses_drafts_that_are_no_tokens(engine):
    args = _verification(2, 3, [3, 3])
    args[0][:] = -1
    assert engine[2].rejection_sample(*args)[:, 1:].eq(-1).all()


@pytest.mark.parametrize("change", ["sampled", "ragged", "synthetic", "none drafted"])
def test_verify_leaves_to_the_original(engine, change):
    args = _verification(2, 3, [1, 3])
    if change == "sampled":
        args[-1].all_greedy = False
    elif change == "ragged":
        args[0], args[1], args[5] = args[0][:5], [2, 3], args[5][:5]
    elif change == "none drafted":
        args[0], args[1], args[2], args[5] = args[0][:0], [0, 0], 0, args[5][:0]
    expected = fake.rejection_sample(*args)
    found = engine[2].rejection_sample(*args, synthetic_mode=change == "synthetic")
    assert torch.equal(found, expected) and args[-1].calls == 2


def _parameters(root, hook):
    """From the source of vLLM at root; None where the file is not there."""
    module, path = hook.target.split(":")
    *owner, name = path.split(".")
    files = [root.parent / f"{module.replace('.', '/')}.py", root / "v1" / "spec_decode" / "llm_base_proposer.py"]
    for file in files if owner else files[:1]:  # the base class of DFlash's proposer
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.exists() else ():
            if isinstance(node, ast.FunctionDef) and node.name == name:
                of_class = any(getattr(d, "id", "") == "classmethod" for d in node.decorator_list)
                return tuple(a.arg for a in node.args.args)[of_class:]
    return None


ENGINES = [p for p in (FOLDER / "vllm", *FOLDER.parent.glob("vllm/lib/python*/site-packages/vllm")) if p.exists()]


@pytest.mark.skipif(not ENGINES, reason="no vLLM is there: `make engine-vllm` or `make peer-kernels`")
@pytest.mark.parametrize("hook", plugin.hooks(), ids=lambda hook: hook.name)
def test_parameters_are_those_of_the_real_engine(hook):
    found = [_parameters(root, hook) for root in ENGINES]
    assert {p for p in found if p} <= set(hook.parameters)
    if not any(found):
        pytest.skip(f"the file of {hook.target} is not there: `make engine-vllm`")


def test_hooks_use_public_names_alone():
    for module in (context, head, verify):
        for name, value in vars(module).items():
            if getattr(value, "__module__", "").startswith("dflash_kernels."):
                assert getattr(dflash_kernels, name) is value
