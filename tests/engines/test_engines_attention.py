"""vLLM's attention backend for the drafter, without vLLM: who gets it, and what it computes."""

import importlib
import logging
import pickle
import sys
import types

import pytest
import torch

from dflash_engines import vllm as plugin
from dflash_engines.vllm import attention
from tests.support import fake_vllm as fake
from tests.support.attention_parts import DRAFTER, HEADS, WIDTH, built, expected, layer_of, why


@pytest.fixture
def install(monkeypatch):
    """Puts the stand-in there with the hook on; returns its modules by their last name."""
    def run(device="cpu", enable="attention", version="0.32.0"):
        fake.install(monkeypatch, version, device)
        monkeypatch.setenv("DFLASH_VLLM_ENABLE", enable)
        return types.SimpleNamespace(config=sys.modules["vllm.config"].current, why=lambda: why("attention", device),
                                     names=sys.modules["vllm.v1.attention.backends.registry"].AttentionBackendEnum,
                                     platform=sys.modules["vllm.platforms.cpu"].CpuPlatform)

    backend = "dflash_engines.vllm.attention_backend"
    monkeypatch.delitem(sys.modules, backend, raising=False)
    yield run
    sys.modules.pop(backend, None)  # its base classes were the stand-in's


@pytest.fixture
def backend(install):
    install()
    return importlib.import_module("dflash_engines.vllm.attention_backend")


def test_the_drafter_gets_it_and_nobody_else(install):
    engine = install()
    assert engine.why() == engine.why() == "" and engine.names["DFLASH"].value == attention.CLASS
    chosen = types.SimpleNamespace(name="CPU_ATTN")
    ask = engine.platform().get_attn_backend_cls  # the engine asks an instance
    assert ask(None, attn_selector_config=DRAFTER, num_heads=None) == attention.CLASS
    assert ask(types.SimpleNamespace(name="DFLASH"), attn_selector_config=DRAFTER) == attention.CLASS
    assert ask(None, attn_selector_config=fake.SelectorConfig()) == ("CpuPlatform", None)  # the target
    assert ask(types.SimpleNamespace(name="DFLASH"), attn_selector_config=fake.SelectorConfig()) == (
        "CpuPlatform", "DFLASH")
    assert ask(chosen, attn_selector_config=DRAFTER) == ("CpuPlatform", "CPU_ATTN")  # somebody chose
    engine.config.speculative_config.method = "dspark"
    assert ask(None, attn_selector_config=DRAFTER) == ("CpuPlatform", None)
    engine.config.speculative_config = None
    assert ask(None, attn_selector_config=DRAFTER) == ("CpuPlatform", None)


@pytest.mark.parametrize("layer, why", [
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"), ({"has_sliding_window": True}, "sliding window"),
    ({"dtype": torch.float64}, "dtype not supported"), ("v2", "the V2 runner not supported")])
def test_what_it_does_not_cover_stays_with_the_engine(install, caplog, layer, why):
    engine = install()
    assert engine.why() == ""
    if layer == "v2":
        engine.config.use_v2_model_runner, layer = True, {}
    with caplog.at_level(logging.INFO):
        found = engine.platform.get_attn_backend_cls(None, DRAFTER._replace(**layer))
    assert found == ("CpuPlatform", None) and f"attention: not active for this model, {why}" in caplog.text


def test_a_target_cannot_have_it_by_name(install):
    """Nobody would write the K/V of its tokens. A GPU's platform asks the backend itself."""
    engine = install()
    assert engine.why() == ""
    backend = importlib.import_module("dflash_engines.vllm.attention_backend").DFlashAttentionBackend

    def reasons(layer):
        return backend.validate_configuration(device_capability=None, **layer._asdict())

    assert reasons(DRAFTER) == [] and "DFlash drafter" in reasons(fake.SelectorConfig())[0]
    engine.config.speculative_config.method = "dspark"
    assert "DFlash drafter" in reasons(DRAFTER)[0]
    engine.config.speculative_config = None
    assert "DFlash drafter" in reasons(DRAFTER)[0]


def test_vllms_batch_invariant_mode_takes_it(install):
    """The bits: tests/engines/test_engines_invariance.py."""
    engine = install()
    assert engine.why() == ""
    invariant = DRAFTER._replace(use_batch_invariant=True)
    assert engine.platform.get_attn_backend_cls(None, invariant) == attention.CLASS


def test_off_by_itself_on_a_cpu_and_by_name_on_a_gpu(install):
    engine = install(enable="")
    assert engine.why() == "slower than the engine's own on cpu"
    assert engine.platform.get_attn_backend_cls(None, DRAFTER) == ("CpuPlatform", None)
    engine = install("cuda", enable="")
    for _ in range(2):  # a process may load plugins twice, and the registry takes a name once
        assert engine.why() == '"attention_backend": "DFLASH" in the speculative configuration asks for it'
    assert engine.names["DFLASH"].value == attention.CLASS
    assert engine.platform.get_attn_backend_cls(None, DRAFTER) == ("CpuPlatform", None)


def test_the_name_reaches_processes_that_have_not_loaded_plugins(install):
    """vLLM pickles the configuration for its workers, which unpickle it first."""
    engine = install(enable="")
    plugin.register()
    packed = pickle.dumps({"backend": engine.names["DFLASH"], "other": 1})
    other = install(enable="")
    assert "DFLASH" not in other.names.__members__
    assert pickle.loads(packed) == {"backend": other.names["DFLASH"], "other": 1}
    assert other.names["DFLASH"].value == attention.CLASS


def test_the_name_is_there_before_a_configuration_is_read(install):
    """It may hold the name, and is read before there is a proposer."""
    engine = install(enable="")
    plugin.register()
    assert engine.names["DFLASH"].value == attention.CLASS


def test_a_changed_registry_leaves_it(install, monkeypatch, caplog):
    engine = install()
    monkeypatch.setattr(sys.modules["vllm.v1.attention.backends.registry"], "register_backend",
                        lambda backend, factory: None)
    assert engine.why() == "the engine's registry has no DFLASH"
    assert "TypeError: register_backend takes backend, factory" in caplog.text
    assert engine.platform.get_attn_backend_cls(None, DRAFTER) == ("CpuPlatform", None)


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_the_block_sees_its_context_and_itself(backend, heads_first, causal):
    torch.manual_seed(3)
    layer, lens = layer_of(backend, heads_first), [7, 0]
    made = built(backend, lens, causal=causal)
    assert made.causal is causal and made.context_lens.tolist() == lens
    context = torch.randn(7, 2, fake.KV_HEADS, fake.HEAD_DIM)
    slots = made.page_table[0, torch.arange(7) // fake.PAGE].long() * fake.PAGE + torch.arange(7) % fake.PAGE
    layer.impl.do_kv_cache_update(layer, context[:, 0], context[:, 1], layer.kv_cache, slots)
    there = layer.kv_cache.clone()
    padded = 2 * WIDTH + 2  # as a graph pads them
    q, k, v = (torch.randn(padded, heads, fake.HEAD_DIM) for heads in (HEADS, fake.KV_HEADS, fake.KV_HEADS))
    out = torch.full_like(q, 9)
    assert layer.impl.forward(layer, q, k, v, layer.kv_cache, made, out) is out
    for b, c in enumerate(lens):
        rows = slice(b * WIDTH, (b + 1) * WIDTH)
        torch.testing.assert_close(out[rows], expected(q[rows], k[rows], v[rows], context[:c], causal))
    assert (out[2 * WIDTH:] == 9).all() and torch.equal(layer.kv_cache, there)  # the block is not written to the cache


def test_context_kv_by_the_engines_own_way(backend):
    ours, theirs = layer_of(backend, True), fake.Layer(torch.float32, True)
    key, value = torch.randn(2, 4, fake.KV_HEADS, fake.HEAD_DIM)
    for layer in (ours, theirs):
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, torch.tensor([9, -1, 3, 22]))
    assert theirs.kv_cache.any() and torch.equal(ours.kv_cache, theirs.kv_cache)
    woken = torch.zeros_like(ours.kv_cache)
    ours.impl.do_kv_cache_update(ours, key, value, woken, torch.tensor([9, -1, 3, 22]))
    assert torch.equal(woken, theirs.kv_cache)


def test_what_a_drafters_pass_never_is(backend):
    layer = layer_of(backend, True)
    q, kv = torch.zeros(5, HEADS, fake.HEAD_DIM), torch.zeros(5, fake.KV_HEADS, fake.HEAD_DIM)
    out = torch.full_like(q, 9)
    assert layer.impl.forward(layer, q, kv, kv, layer.kv_cache, None, out) is out and (out == 9).all()
    assert built(backend, [7, 4], width=3, tokens=5).width == 0  # the target's pass: metadata are made, and not used
    with pytest.raises(NotImplementedError, match="windows"):
        backend.DFlashAttention(HEADS, fake.HEAD_DIM, 0.3, fake.KV_HEADS, sliding_window=8)


def test_context_kv_goes_straight_into_its_pages(backend):
    """No write of the engine's between: on a CPU the rows are those of a PagedKV."""
    model, theirs = sys.modules["vllm.model_executor.models.qwen3_dflash"].DFlashQwen3Model(), fake.DFlashQwen3Model()
    for layer in model._attn_layers:
        layer.attn_backend, layer.impl = backend.DFlashAttentionBackend, None
    assert why("context_kv") == ""
    given = torch.randn(5, fake.HIDDEN), torch.arange(7, 12), torch.tensor([9, 3, -1, 22, 1])
    model.precompute_and_store_context_kv(*given)
    theirs.precompute_and_store_context_kv(*given)
    assert model.calls == 0 and backend.DFlashAttentionBackend.get_name() == "DFLASH"
    for a, b in zip(model._attn_layers, theirs._attn_layers, strict=True):
        torch.testing.assert_close(a.kv_cache, b.kv_cache)
