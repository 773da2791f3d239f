"""A fault in each of vLLM's hooks, before its first write and after it: the engine's own gives the answer, the log says
so once, and the hook is off from then on. The drafter's attention: tests/engines/test_engines_attention_faults.py.

The fault used to come out of `generate`, and the next request never returned.
"""

import gc
import sys
import types

import pytest
import torch

from dflash_engines import vllm as plugin
from dflash_engines.vllm import context, head, verify, verify_v2
from tests.support import attention_parts as attention
from tests.support import fake_vllm as fake

WHEN = pytest.mark.parametrize("after", [False, True], ids=["before the first write", "after it"])


@pytest.fixture
def engine(monkeypatch):
    return fake.running(monkeypatch)


def break_op(monkeypatch, module, name, after):
    """The op that a hook calls raises: at once, or when all that it writes is garbage. Returns its calls."""
    calls = []

    def broken(*args, **kwargs):
        calls.append(args)
        if after:
            spoil(*args, **kwargs)
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(module, name, broken)
    return calls


def spoil(*args, **kwargs):
    """Garbage in what write_context_kv may write, the rows of its slots in all caches, and in every `out`."""
    if "rounding" in kwargs or "cos_sin" in kwargs:
        _, _, slots, caches = args
        for cache in caches:
            for part in (cache.k, cache.v):
                for slot in slots[slots >= 0].tolist():
                    part[slot // part.shape[1], slot % part.shape[1]] = 77.0
    if kwargs.get("out") is not None:
        kwargs["out"].fill_(77.0)


def said_once(caplog, hook, op):
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert [r.getMessage() for r in warnings] == [
        f"dflash-kernels: {hook}: failed and is now off in this process. RuntimeError: {op} is broken"]
    assert warnings[0].exc_info is not None


def context_calls(tokens=5):
    torch.manual_seed(tokens)
    return torch.randn(tokens, fake.HIDDEN), torch.arange(7, 7 + tokens), torch.tensor([9, 3, -1, 22, 1])[:tokens]


@WHEN
@pytest.mark.parametrize("backend", ["CPU_ATTN", "FLASH_ATTN"])
@pytest.mark.parametrize("v_scale", [None, 0.7])
def test_a_fault_in_context_kv(engine, monkeypatch, caplog, backend, after, v_scale):
    """Once through rows that the engine writes, once straight into its pages."""
    ours, theirs = engine.model(v_scale=v_scale), fake.DFlashQwen3Model(v_scale=v_scale)
    for layer in ours._attn_layers:
        layer.attn_backend = type("Backend", (fake.Backend,), {"name": backend})
    calls = break_op(monkeypatch, context, "write_context_kv", after)
    for tokens in (5, 3, 5):
        for model in (ours, theirs):
            model.precompute_and_store_context_kv(*context_calls(tokens))
        for a, b in zip(ours._attn_layers, theirs._attn_layers, strict=True):
            assert b.kv_cache.any() and torch.equal(a.kv_cache, b.kv_cache)
    assert len(calls) == 1 and ours.calls == theirs.calls == 3
    said_once(caplog, "context_kv", "write_context_kv")


def test_a_fault_between_the_layers_of_context_kv(engine, caplog):
    """Rows are written, and the engine's write of the second layer raises: the original writes all of them."""
    ours, theirs = engine.model(), fake.DFlashQwen3Model()
    layer, answers = ours._attn_layers[1], [RuntimeError("write_context_kv is broken")]
    inner = layer.do_kv_cache_update

    def update(*args):
        if answers:
            args[3].fill_(77.0)
            raise answers.pop()
        args[3][args[3] == 77.0] = 0
        inner(*args)

    layer.do_kv_cache_update = update
    for model in (ours, theirs):
        model.precompute_and_store_context_kv(*context_calls())
    for a, b in zip(ours._attn_layers, theirs._attn_layers, strict=True):
        assert torch.equal(a.kv_cache, b.kv_cache)
    said_once(caplog, "context_kv", "write_context_kv")


@WHEN
@pytest.mark.parametrize("where", ["lm_head_argmax", "pack_weight"])
def test_a_fault_in_draft_head(engine, monkeypatch, caplog, where, after):
    calls, hidden = break_op(monkeypatch, head, where, after), torch.randn(9, fake.HIDDEN)
    expected = engine.drafter.model.compute_logits(hidden).argmax(-1)
    for _ in range(3):
        assert torch.equal(engine.drafter._greedy_sample(hidden), expected)
    assert len(calls) == 1
    said_once(caplog, "draft_head", where)


@WHEN
def test_a_fault_in_verify(engine, monkeypatch, caplog, after):
    calls = break_op(monkeypatch, verify, "verify_greedy", after)
    logits = torch.randn(6, fake.VOCAB)
    drafts = logits.argmax(-1).int()
    drafts[4] += 1
    metadata = engine.runner.input_batch.sampling_metadata
    for _ in range(3):
        found = engine.sampler.rejection_sample(drafts, [3, 3], 3, None, None, logits, torch.tensor([[7], [8]]),
                                                metadata)
        assert found[0].tolist() == [*drafts[:3].tolist(), 7] and found[1, 2:].tolist() == [-1, -1]
    assert len(calls) == 1 and metadata.calls == 3
    said_once(caplog, "verify", "verify_greedy")


def v2_call(monkeypatch):
    """The V2 runner's function with the hook on, and what its sampler calls it with."""
    fake.install(monkeypatch, device="cuda")
    monkeypatch.setenv("DFLASH_VLLM_ENABLE", "verify_v2")
    plugin.register()
    speculator = sys.modules["vllm.v1.worker.gpu.spec_decode.dflash.speculator"].DFlashSpeculator
    fake.make(speculator, device="cuda:0")
    states = types.SimpleNamespace(temperature=types.SimpleNamespace(gpu=torch.zeros(4)))
    made = types.SimpleNamespace(sampling_states=states)
    sampler = sys.modules["vllm.v1.worker.gpu.spec_decode.rejection_sampler"].RejectionSampler(
        made, fake.config().speculative_config, torch.device("cuda:0"))
    given = {"target_logits": torch.randn(8, fake.VOCAB), "draft_logits": None,
             "draft_sampled": torch.zeros(8, dtype=torch.int32), "cu_num_logits": torch.tensor([0, 4, 8]),
             "pos": torch.arange(8), "idx_mapping": torch.tensor([0, 2]), "expanded_idx_mapping": None,
             "expanded_local_pos": None, "temperature": states.temperature.gpu, "seed": torch.zeros(4).long(),
             "num_speculative_steps": 3}
    return sys.modules["vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"].rejection_sample, given, sampler


@WHEN
def test_a_fault_in_verify_v2(monkeypatch, caplog, after):
    sample, given, _sampler = v2_call(monkeypatch)
    assert sample(**given)[1].tolist() == [1, 1]
    calls = break_op(monkeypatch, verify_v2, "verify_sample", after)
    assert [sample(**given) for _ in range(3)] == ["theirs"] * 3 and len(calls) == 1
    said_once(caplog, "verify_v2", "verify_sample")


def test_a_fault_in_verify_v2_on_one_of_two_ranks_ends_it(monkeypatch, caplog):
    """Its numbers are not the engine's: a rank that went back alone would emit other tokens than the others."""
    sample, given, _sampler = v2_call(monkeypatch)
    break_op(monkeypatch, verify_v2, "verify_sample", False)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="verify_sample is broken"):
        sample(**given)


def test_verify_v2_acts_for_dflash_alone(monkeypatch):
    sample, given, sampler = v2_call(monkeypatch)
    assert list(verify_v2.SAMPLERS) == [sampler]
    assert sample(**given | {"temperature": torch.zeros(4)}) == "theirs"  # another sampler's
    eagle = type(sampler)(sampler.sampler, fake.config("eagle3").speculative_config, torch.device("cuda:0"))
    assert list(verify_v2.SAMPLERS) == [sampler] and eagle is not sampler
    eagle = sampler = None
    gc.collect()
    assert not list(verify_v2.SAMPLERS)  # none is kept


@WHEN
def test_a_fault_in_the_choice_of_attention(monkeypatch, caplog, after):
    fake.install(monkeypatch)
    monkeypatch.setenv("DFLASH_VLLM_ENABLE", "attention")
    assert attention.why("attention") == ""
    backend = types.ModuleType("dflash_engines.vllm.attention_backend")
    if after:  # it is there, and asking it raises
        backend.DFlashAttentionBackend = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    platform = sys.modules["vllm.platforms.cpu"].CpuPlatform
    for _ in range(2):
        assert platform.get_attn_backend_cls(None, attention.DRAFTER) == ("CpuPlatform", None)
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert "attention: failed and is now off" in caplog.text
