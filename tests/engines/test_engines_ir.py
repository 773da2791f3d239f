"""Our norms as implementations of vLLM's IR ops: the real ones of its wheel, or stand-ins that check as they do."""

import importlib.util
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.library import infer_schema

from bench.peers import gpu_peers
from dflash_engines.vllm import ir_ops
from dflash_kernels.testing import assert_within_budget, same_bits
from tests.support import ROOT
from tests.support.engine_files import FOLDER

EPS = 1e-6
PYTHON = FOLDER.parent / "vllm" / "bin" / "python"


class StandIn:
    """What register_impl asks of an implementation, and which one a call goes to."""

    def __init__(self, native, name):
        self.native, self.name, self.impls, self.priority = native, name, {}, ["native"]

    def register_impl(self, provider, *, supported=True, supports_args=None, inplace=False):
        def register(function):
            assert infer_schema(function, mutates_args=[]) == infer_schema(self.native, mutates_args=[])
            asked, known = (list(inspect.signature(f).parameters.values()) for f in (supports_args, self.native))
            assert [(p.name, p.default) for p in asked] == [(p.name, p.default) for p in known]
            self.impls[provider] = types.SimpleNamespace(impl_fn=function, supported=supported, inplace=inplace,
                                                         supports_args=supports_args)

        return register


def norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None,
         ) -> torch.Tensor:
    ...


def add_norm(x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float,
             variance_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    ...


def real():
    try:
        module = gpu_peers.load("vllm", "ir/ops/layernorm.py")
    except gpu_peers.Absent as why:
        pytest.skip(str(why))
    return [module.rms_norm, module.fused_add_rms_norm]


def vllm_of(monkeypatch, ops, version="0.33.0"):
    made = types.ModuleType("vllm")
    made.__version__, made.ir = version, types.SimpleNamespace(
        ops=types.SimpleNamespace(rms_norm=ops[0], fused_add_rms_norm=ops[1]))
    monkeypatch.setitem(sys.modules, "vllm", made)
    ir_ops.enter(made)
    return ops


@pytest.fixture(params=["stand-in", "real"])
def ops(request, monkeypatch):
    found = vllm_of(monkeypatch, real() if request.param == "real" else
                    [StandIn(norm, "rms_norm"), StandIn(add_norm, "fused_add_rms_norm")])
    yield found
    for op in found:
        op.impls.pop("dflash", None)


def given(rows=7, width=96, dtype=torch.bfloat16):
    return [torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)]


def near(found, x, weight):
    wide = x.double()
    truth = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()
    assert_within_budget(found, truth, torch.nn.functional.rms_norm(x, weight.shape, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_compute_the_norms(ops, dtype):
    x, residual, weight = given(dtype=dtype)
    found = ops[0].impls["dflash"].impl_fn(x, weight, EPS)
    near(found, x, weight)
    total, into, kept = x + residual, x.clone(), residual.clone()
    normed, summed = ops[1].impls["dflash"].impl_fn(into, kept, weight, EPS)
    assert normed is into and summed is kept and ops[1].impls["dflash"].inplace
    assert torch.equal(summed, total)
    near(normed, total, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_vllms_own_tolerances(monkeypatch, dtype):
    norm, add = vllm_of(monkeypatch, real())
    x, residual, weight = given(64, 576, dtype)
    for op, arguments in ((norm, (x, weight, EPS)), (add, (x, residual, weight, EPS))):
        with op.set_priority(["dflash", "native"]):
            assert op.get_priority() == ["dflash", "native"] and op.dispatch(*arguments).provider == "dflash"
            found = op.torch_op(*arguments)
        expected = op.impls["native"].impl_fn(*arguments)
        torch.testing.assert_close(found, expected, **op.get_tolerance(dtype))
        assert op.dispatch(*arguments).provider == "native"  # nobody named us: not used
        op.impls.pop("dflash")


def test_other_arguments_go_to_vllms_own(ops):
    x, residual, weight = given()
    asks, asks_add = (op.impls["dflash"].supports_args for op in ops)
    assert asks(x, weight, EPS) and asks_add(x, residual, weight, EPS)
    assert asks(given(7, 200)[0][:, :96], weight, EPS) and asks(x.view(7, 2, 48), weight[:48], EPS)
    refused = [(x, None, EPS), (x, weight, EPS, 48), (x, weight.float(), EPS), (x.double(), weight.double(), EPS),
               (x, weight.repeat_interleave(2)[::2], EPS), (x.t().contiguous().t(), weight, EPS),
               (given(7, 192)[0].view(7, 2, 96)[:, :1], weight, EPS), (x[:1].expand(7, 96), weight, EPS)]
    for arguments in refused:
        assert not asks(*arguments)
        assert not asks_add(arguments[0], torch.zeros_like(arguments[0]), *arguments[1:])
    assert not asks_add(x, residual.float(), weight, EPS) and not asks_add(x, residual[:3], weight, EPS)


def test_a_row_has_the_same_bits_in_every_batch(ops):
    """As VLLM_BATCH_INVARIANT asks of a norm."""
    x, residual, weight = given(33, 200)
    norm, add = (op.impls["dflash"].impl_fn for op in ops)
    together, sums = norm(x, weight, EPS), add(x.clone(), residual.clone(), weight, EPS)
    for at in (0, 7, 32):
        one = slice(at, at + 1)
        assert same_bits(norm(x[one], weight, EPS), together[one])
        for found, expected in zip(add(x[one].clone(), residual[one].clone(), weight, EPS), sums, strict=True):
            assert same_bits(found, expected[one])


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM is installed there: `make engine-vllm`")
def test_on_the_real_engines_ops():
    run = subprocess.run([PYTHON, "-m", "tests.support.vllm_ir"], capture_output=True, text=True, cwd=ROOT, env={
        "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())})
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["rms_norm"] == found["fused_add_rms_norm"] == ["dflash", "native"]  # named, and not named
    assert found["before"] == [["native"]] * 2


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.34.0"])
def test_another_version_gets_none_and_one_line(monkeypatch, caplog, version):
    with caplog.at_level("INFO"):
        ops = vllm_of(monkeypatch, [StandIn(norm, "rms_norm"), StandIn(add_norm, "fused_add_rms_norm")], version)
    assert [op.impls for op in ops] == [{}, {}]
    assert caplog.messages == [
        f"dflash-kernels: IR ops: not offered, version {version} was not read; 0.32.0, 0.33.0 were"]


def test_without_triton_a_gpu_is_left_to_vllm(monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    for cuda in ("13.0", None):
        caplog.clear()
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with caplog.at_level("INFO"):
            ops = vllm_of(monkeypatch, [StandIn(norm, "rms_norm"), StandIn(add_norm, "fused_add_rms_norm")])
        assert [op.impls["dflash"].supported for op in ops] == [cuda is None] * 2
        assert caplog.text.count("is missing; pip install triton") == (cuda is not None)
