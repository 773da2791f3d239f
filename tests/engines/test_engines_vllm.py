"""vLLM's plugin without vLLM: what is replaced when, and by whom it is used, in a small stand-in with its names."""

import contextlib
import functools
import gc
import inspect
import json
import logging
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import dflash_kernels
from dflash_engines import dflash2, sources
from dflash_engines import vllm as plugin
from dflash_engines.vllm import context, head, selector, verify
from tests.support import ROOT
from tests.support import fake_vllm as fake
from tests.support.engine_files import FOLDER


def seen(names=plugin.V1, **given):
    """What a proposer's making installs, by the hook's name."""
    arguments = {"vllm_config": fake.config(), "device": torch.device("cpu")} | given
    return {o.name: o.why for o in plugin.seen(arguments, names)}


def test_what_is_on_by_itself(monkeypatch):
    fake.install(monkeypatch)
    plugin.register()
    assert seen() == {"context_kv": "", "attention": "slower than the engine's own on cpu", "draft_head": "",
                      "verify": ""}
    assert seen(plugin.V2) == {"context_kv": "", "verify_v2": "not measured on cpu yet"}


def test_on_a_gpu_nothing_is_on_by_itself(monkeypatch, caplog):
    model, proposer, sampler = fake.install(monkeypatch, device="cuda")
    with caplog.at_level(logging.INFO):
        plugin.register()
        fake.make(proposer, device="cuda:0")
    assert not hasattr(model.precompute_and_store_context_kv, "dflash_original")
    assert sampler.rejection_sample is fake.rejection_sample and "_greedy_sample" not in vars(proposer)
    assert caplog.messages[-1] == ("dflash-kernels: not replaced, because not measured on sm_90 yet: context_kv, "
                                   "draft_head, verify; enable with DFLASH_VLLM_ENABLE=context_kv,draft_head,verify")
    assert caplog.messages[:-1] == [
        'dflash-kernels: attention: not replaced, "attention_backend": "DFLASH" in the speculative configuration asks '
        "for it (vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls)"]
    monkeypatch.setenv("DFLASH_VLLM_ENABLE", "draft_head")
    fake.make(proposer, device="cuda:0")
    assert hasattr(proposer._greedy_sample, "dflash_original") and sampler.rejection_sample is fake.rejection_sample


@pytest.mark.parametrize("names, asked, others", [
    (plugin.V1, "draft_head,verify_v2", "verify_v2"), (plugin.V2, "context_kv,verify,draft_head", "draft_head,verify"),
    (plugin.V2, "verify_v2,grouped_conv", ""), (plugin.DFLASH2, "verify_v2,grouped_conv,verify", "")])
def test_names_of_the_other_runner_s_hooks_are_warned_of(names, asked, others, monkeypatch, caplog):
    fake.install(monkeypatch)
    monkeypatch.setenv("DFLASH_VLLM_ENABLE", asked)
    plugin.register()
    seen(names)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "runner" in r.getMessage()] == (
        others and ["dflash-kernels: DFLASH_VLLM_ENABLE must be names of this model runner's hooks, "
                    f"{','.join(names)}; got {others}"] or [])


def test_nothing_is_replaced_before_a_proposer_of_dflash(monkeypatch, caplog):
    """Methods derived from DFlash have its classes; the others never come here."""
    model, proposer, sampler = fake.install(monkeypatch)
    with caplog.at_level(logging.INFO):
        plugin.register()
        fake.make(proposer, method="dspark")
    assert sampler.rejection_sample is fake.rejection_sample and not caplog.records
    assert not hasattr(model.precompute_and_store_context_kv, "dflash_original")
    fake.make(proposer)
    assert sampler.rejection_sample is not fake.rejection_sample and "_greedy_sample" in vars(proposer)
    assert not hasattr(fake.SpecDecodeBaseProposer._greedy_sample, "dflash_original")  # other methods' proposers


def test_registering_twice_and_turning_off(monkeypatch, caplog):
    model, proposer, sampler = fake.install(monkeypatch)
    monkeypatch.setenv("DFLASH_VLLM_DISABLE", "verify")
    plugin.register()
    plugin.register()
    with caplog.at_level(logging.INFO):
        fake.make(proposer)
        first = proposer._greedy_sample
        fake.make(proposer)
    assert proposer._greedy_sample is first and sampler.rejection_sample is fake.rejection_sample
    assert "verify: not replaced, disabled by DFLASH_VLLM_DISABLE" in caplog.text


def test_with_a_version_that_was_not_read(monkeypatch):
    for version in ("0.32.1", "0.34.0", "0.33.0rc1", "dev"):
        fake.install(monkeypatch, version)
        monkeypatch.setenv("DFLASH_VLLM_ENABLE", "attention,verify_v2,grouped_conv,selector")
        plugin.register()
        outcomes = {*seen().values(), *seen(plugin.V2).values(), *seen(plugin.DFLASH2).values()}
        assert outcomes == {f"version {version} was not read; 0.32.0 was"}
        assert "DFLASH" not in sys.modules[plugin.REGISTRY].AttentionBackendEnum.__members__


def test_an_engine_that_is_built_otherwise_is_not_in_the_way(monkeypatch, caplog):
    """What we look for is gone: a line in the log, and the engine's own proposer."""
    _, proposer, _ = fake.install(monkeypatch)
    plugin.register()
    config = types.SimpleNamespace(speculative_config=None)
    assert proposer(config, torch.device("cpu")).dtype == torch.float32
    assert "nothing replaced, AttributeError: 'NoneType' object has no attribute 'method'" in caplog.text
    monkeypatch.delattr(sys.modules["vllm.v1.spec_decode.dflash"], "DFlashProposer")
    plugin.register()
    assert "nothing replaced, AttributeError: module 'vllm.v1.spec_decode.dflash' has no attribute" in caplog.text


@pytest.mark.parametrize("name", [hook.name for hook in plugin.hooks()])
def test_a_changed_function_leaves_that_hook_alone(monkeypatch, caplog, name):
    """The same parameters, another body."""
    fake.install(monkeypatch)
    monkeypatch.setenv("DFLASH_VLLM_ENABLE", "attention,verify_v2,grouped_conv,selector")
    plugin.register()
    target = next(hook.target for hook in plugin.hooks() if hook.name == name)
    owner, attribute, original = sources.resolve(target)
    of_class = isinstance(inspect.getattr_static(owner, attribute), classmethod)

    @functools.wraps(original)
    def changed(*args):
        return "theirs"

    setattr(owner, attribute, classmethod(changed) if of_class else changed)
    with caplog.at_level(logging.INFO):
        outcomes = seen() | seen(plugin.V2) | seen(plugin.DFLASH2)
    assert outcomes.pop(name) == "its source is not that of 0.32.0+cpu" and set(outcomes.values()) == {""}
    assert f"{name}: not replaced, its source is not that of 0.32.0+cpu ({target})" in caplog.text
    assert getattr(owner, attribute)(1, 2, 3) == "theirs"  # the engine's own, as it was


ENGINES = [p for p in (FOLDER / "vllm", *FOLDER.parent.glob("vllm/lib/python*/site-packages/vllm")) if p.exists()]


@pytest.mark.skipif(not ENGINES, reason="no vLLM is there: `make engine-vllm` or `make peer-kernels`")
@pytest.mark.parametrize("hook", plugin.hooks(), ids=lambda hook: hook.name)
def test_sources_are_those_of_the_real_engine(hook):
    found = set()
    for root in ENGINES:
        with contextlib.suppress(FileNotFoundError):
            found.add(sources.of_folder(root.parent, hook.sources))
    if not found:
        pytest.skip(f"the file of {hook.target} is not there: `make engine-vllm`")
    assert found <= set(hook.read.values())


PYTHON = FOLDER.parent / "vllm" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM is installed there: `make engine-vllm`")
def test_hooks_for_dflash2_on_the_real_engines_modules():
    """Its own classes, operator and compile decorators, by the installed digests."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    run = subprocess.run([PYTHON, "-m", "tests.support.vllm_dflash2"], capture_output=True, text=True, cwd=ROOT,
                         env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert [line.split(": ")[1].partition(" (")[0] for line in found["outcomes"]] == ["replaced"] * 2
    assert found["put off"] == "Deferred" and found["drafts"] == found["by all edges"]
    assert 0 < found["convolution off"] <= found["half a step"]


def test_hooks_use_public_names_alone():
    for module in (context, dflash2, head, selector, verify):
        ours = {name: value for name, value in vars(module).items()
                if getattr(value, "__module__", "").startswith("dflash_kernels.")}
        assert ours and all(getattr(dflash_kernels, name) is value for name, value in ours.items())


def test_a_cache_that_the_engine_drops_is_not_kept():
    """It measures memory with one before it makes that which it serves with."""
    memory = np.zeros((4, 2, 8, 2 * fake.HEAD_DIM), dtype=np.float32)
    dropped, kv_cache = weakref.ref(memory), torch.from_numpy(memory)
    view = context.paged(kv_cache, fake.HEAD_DIM)
    assert context.paged(kv_cache, fake.HEAD_DIM) is view and view.k.data_ptr() == kv_cache.data_ptr()
    del memory, view, kv_cache
    gc.collect()
    assert dropped() is None
