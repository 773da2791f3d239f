"""Our ops in SGLang's kernel registry, and what they declare in the terms of its contract for plugins."""

import importlib.util
import inspect

import pytest
import torch
import torch.nn.functional as F

import dflash_kernels
from dflash_engines import sglang as plugin
from dflash_engines.sglang import registry
from dflash_kernels.testing import assert_within_budget, same_bits
from tests.support import sglang_registry
from tests.support.engine_files import take


@pytest.fixture(params=["stand-in", "real"])
def sglang(request, monkeypatch):
    return sglang_registry.installed(monkeypatch, request.param)


def ours(kernels):
    return {spec.op: spec for spec in kernels.registry.all_specs() if spec.backend is kernels.KernelBackend.PLUGIN}


def test_every_op_is_entered_once_and_can_be_called(sglang, caplog):
    kernels, _ = sglang
    before = kernels.registry.all_specs()
    with caplog.at_level("INFO"):
        plugin._enter(kernels)
        plugin._enter(kernels)
    names = dflash_kernels.build_info()["ops"]
    assert sorted(ours(kernels)) == [f"dflash.{op}" for op in names] and list(registry.OPS) == names
    assert len(kernels.registry.all_specs()) == len(before) + len(names)
    assert f"registry: {len(names)} ops entered\n" in caplog.text + "\n"
    for op in names:
        assert kernels.get_kernel(f"dflash.{op}", kernels.KernelBackend.PLUGIN) is getattr(dflash_kernels, op)


def test_names_of_sglang_are_entered_on_request_alone(sglang, monkeypatch):
    kernels, _ = sglang
    monkeypatch.setenv("DFLASH_SGLANG_ENABLE", "context_kv, shared_ops")
    registry.enter(kernels)
    assert set(registry.SHARED) < set(ours(kernels))


@pytest.mark.parametrize("version, variable, missing, why", [
    ("0.5.22", "", "", "version 0.5.22 was not read; 0.5.23 was"),
    ("0.6.0", "", "", "version 0.6.0 was not read; 0.5.23 was"),
    ("0.5.23", "registry", "", "disabled by DFLASH_SGLANG_DISABLE"),
    ("0.5.23", "", "triton", "triton, which the GPU kernels are written in, is missing; pip install triton")])
def test_nothing_is_entered_and_one_line_says_why(monkeypatch, caplog, version, variable, missing, why):
    kernels, _ = sglang_registry.installed(monkeypatch, "stand-in", version)
    monkeypatch.setenv("DFLASH_SGLANG_DISABLE", variable)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    with caplog.at_level("INFO"):
        registry.enter(kernels)
    assert ours(kernels) == {} and caplog.messages == [f"dflash-kernels: registry: nothing entered, {why}"]


def test_another_registry_or_contract_is_refused(monkeypatch, sglang):
    kernels, contract = sglang
    monkeypatch.setattr(contract, "MEGAKERNEL_API_VERSION", 2)
    with pytest.raises(TypeError, match="SGLang's plugin API must have version 1; got 2"):
        registry.declarations(kernels, contract)
    monkeypatch.setattr(kernels.KernelSpec, "__struct_fields__", ("op", "target"))
    with pytest.raises(TypeError, match="op, backend, target, capabilities and a backend PLUGIN; got op, target"):
        registry.enter(kernels)


def test_declarations(sglang):
    kernels, contract = sglang
    found = {d.spec.op: d for d in registry.declarations(kernels, contract)}
    assert len(found) == len(registry.OPS) + len(registry.SHARED)
    for declared in found.values():
        assert {feature.name for feature in declared.features} == {"SPECULATIVE_DECODING", "DETERMINISTIC_INFERENCE"}
        assert declared.api_version == contract.MEGAKERNEL_API_VERSION and "sm_90" in declared.requires.isas
        assert isinstance(declared.numerics, contract.Numerics)
    exact = {op for op, d in found.items() if d.numerics.kind is contract.NumericsKind.BITWISE}
    assert exact == {"dflash.combine_argmax", "dflash.combine_topk", "dflash.prepare_block", "dflash.verify_greedy",
                     "speculative.compute_dflash_correct_drafts_and_bonus"}
    # The tolerances are those of the tests of every op.
    budget = inspect.signature(assert_within_budget).parameters
    assert [*found["dflash.linear"].numerics.tolerances.values()] == [budget[n].default for n in ("factor", "ulps")]


def test_declared_bits_and_tolerances_hold_beside_sglangs_functions(monkeypatch):
    kernels, _ = sglang_registry.installed(monkeypatch, "stand-in")
    monkeypatch.setenv("DFLASH_SGLANG_ENABLE", "shared_ops")
    registry.enter(kernels)
    accept, silu = (kernels.get_kernel(op, kernels.KernelBackend.PLUGIN) for op in registry.SHARED)
    name = registry.SHARED[0].partition(".")[2]
    theirs = take("sglang", "kernels/ops/speculative/dflash.py", [name], {"torch": torch})[name]
    candidates = torch.randint(3, (64, 8))
    target = torch.where(torch.rand(64, 8) < 0.8, candidates.roll(-1, 1), torch.randint(3, (64, 8)))
    found, expected = (f(candidates=candidates, target_predict=target) for f in (accept, theirs))
    assert len(expected[0].unique()) > 4
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    x, out = torch.randn(5, 64).bfloat16(), torch.empty(5, 32).bfloat16()
    gate, up = x.chunk(2, -1)
    assert silu(x, out) is out
    assert_within_budget(out, F.silu(gate.double()) * up.double(), F.silu(gate) * up)
