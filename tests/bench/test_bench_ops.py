"""Every public op has a benchmark case, in SmolLM2's geometry too, priced by bench.cost."""

import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

import dflash_kernels
from bench import case as cases
from bench import cost
from bench.ops import experts
from bench.peers import cpu_peers
from tests.support.clocks import Clock

BENCHES = ("linear", "attention", "memory", "sample", "small")
EVERY = (*BENCHES, "experts")  # whose layers SmolLM2 has not
TINY = cases.Sizes("cpu", tiny=True)


def benched(names=EVERY):
    return [case for name in names for case in importlib.import_module(f"bench.ops.{name}").cases(TINY)]


def without_a_case(ops, found):
    return sorted(set(ops) - {case.op for case in found})


def test_every_op_has_a_case():
    assert without_a_case(dflash_kernels.build_info()["ops"], benched()) == []


def test_an_op_without_a_case_is_named():
    assert without_a_case(["linear", "combine_topk", "new_op"], benched(["linear"])) == ["combine_topk", "new_op"]


@pytest.mark.parametrize("name", BENCHES)
def test_the_cpu_s_cases_have_smollm2_s_geometry(name):
    """Tiny cases stand for the others only if the others are made of the same table."""
    module = importlib.import_module(f"bench.ops.{name}")
    assert any(key.startswith("smollm2") for key in module.GEOMETRIES["cpu"])
    assert "GEOMETRIES[sizes.name]" in inspect.getsource(module.cases)


def test_smollm2_s_numbers():
    from bench.ops import attention as bench_attention
    from bench.ops import linear as bench_linear
    from bench.ops import memory as bench_memory
    from bench.ops import sample as bench_sample

    g = bench_memory.SMOLLM2
    assert (g.hidden, g.inner, g.heads, g.kv_heads, g.dim, g.vocab) == (576, 1536, 9, 3, 64, 49152)
    assert bench_sample.GEOMETRIES["cpu"]["smollm2"][2] == g.vocab
    assert bench_attention.GEOMETRIES["cpu"]["smollm2"] == (g.heads, g.kv_heads, g.dim)
    assert bench_linear.GEOMETRIES["cpu"]["smollm2 head"] == (g.vocab, g.hidden)
    assert bench_linear.TOPK_GEOMETRIES["cpu"]["smollm2 head"] == (g.vocab, g.hidden)


@pytest.mark.parametrize("name", EVERY)
def test_bytes_and_operations_are_those_of_cost(name, monkeypatch):
    """Where all prices are a million times as high, every case costs that much more."""
    before = benched([name])
    assert before
    for key, price in list(vars(cost).items()):
        if callable(price):
            monkeypatch.setattr(cost, key, lambda *a, price=price, **k: 10**6 * price(*a, **k))
    for cheap, dear in zip(before, benched([name]), strict=True):
        assert dear.bytes == 10**6 * cheap.bytes and dear.flops == 10**6 * cheap.flops, cheap.op


def test_every_case_has_torch_as_it_is_and_compiled():
    cases = benched()
    assert cases
    for case in cases:
        assert callable(case.peers["torch"]) and case.peers["torch.compile"].startswith("left out"), case.op


def test_torch_compile_is_called_as_the_eager_expression_is(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu_peers, "compiled", lambda function: lambda *args: seen.append(function) or function(*args))
    made = []
    problem = SimpleNamespace(expression=lambda x: (x + 1,), args=lambda i: (torch.tensor(i),))
    assert cases.Sizes("cpu").peers_of("o", problem)["torch.compile"](3)[0].item() == 4 and seen == [problem.expression]
    writing = SimpleNamespace(**vars(problem), whole=lambda x: made.append(x.item()), written=lambda: tuple(made))
    for name in ("torch", "torch.compile"):
        assert cases.Sizes("cpu").peers_of("o", writing)[name](3)()[-1] == 3
    assert made == [3, 3]


def test_where_nothing_compiles_it_is_said_once(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("InvalidCxxCompiler: no working compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    cpu_peers.unusable.cache_clear()
    try:
        problem = SimpleNamespace(expression=lambda x: (x,), args=lambda i: (torch.zeros(1),))
        rows = []
        for op in "ab":
            peers = cases.Sizes("cpu").peers_of(op, problem)
            rows += cases.measure([cases.Case(op, "c", lambda i: torch.zeros(1), 4, peers=peers)], 1, TINY)
        assert cases.footnotes(rows) == [
            "torch.compile: inductor does not work here: RuntimeError: InvalidCxxCompiler: no working compiler"]
    finally:
        cpu_peers.unusable.cache_clear()


def test_a_slow_peer_does_some_of_the_copies_and_is_timed_less_often(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(cases, "time", SimpleNamespace(perf_counter=clock))

    def slow(i):
        calls.append(i)
        clock.work(cases.SLOW / 5.5)
        return torch.zeros(1)

    case = cases.Case("op", "c", lambda i: torch.zeros(1), 4, copies=64, peers={"torch": slow})
    call, count = cases.ready(case, "torch", slow, "cpu")
    assert count == 5
    calls.clear()
    call(0)
    call(1)
    assert calls == [i % 64 for i in range(2 * count)]
    assert cases.affordable({"a": slow}, 3) == 3
    assert cases.affordable({"a": lambda i: clock.work(cases.SECONDS / 20.5)}, 100) == 20
    assert cases.affordable({"a": lambda i: clock.work(cases.SECONDS)}, 100) == cases.MIN_RUNS


def test_a_time_is_of_one_copy(monkeypatch):
    """A peer that does half of the copies in a call has its time divided by half as many."""
    monkeypatch.setattr(cases, "ready", lambda case, name, peer, device: (lambda run: [peer(i) for i in range(4)], 4))
    monkeypatch.setattr(cases, "recorded", lambda case, device: case.run)
    monkeypatch.setattr(cases, "interleaved", lambda functions, runs: {
        name: SimpleNamespace(median=8.0, p20=8.0, p80=8.0) for name in functions})
    case = cases.Case("op", "c", lambda i: torch.zeros(1), 4, copies=8, peers={"torch": lambda i: torch.zeros(1)})
    row, = cases.measure([case], 1, TINY)
    assert row["us"] == 1e6 and row["peers"]["torch"] == 2e6


def test_an_engine_s_experts_take_the_same_layer(monkeypatch):
    """Where the engine is installed: rows, weights of both products, weights of the choice, ids in 32 bits."""
    def fused(hidden, w1, w2, topk_weights, topk_ids):
        assert topk_ids.dtype == torch.int32
        return experts.grouped(hidden, w1, w2, topk_ids, topk_weights)[0]

    monkeypatch.setitem(sys.modules, experts.ENGINES["vllm"][0], SimpleNamespace(fused_experts_impl=fused))
    monkeypatch.setitem(sys.modules, experts.ENGINES["sglang"][0], None)
    x, plain = torch.randn(5, 32), (torch.randn(6, 48, 32), torch.randn(6, 32, 24))
    routes = experts.routes_of(5, 6, 2, 0.0)
    peers = experts.peers_of("cuda", x, plain, routes)
    want = dflash_kernels.expert_mlp(x, *(dflash_kernels.pack_experts(w) for w in plain), *routes[1])
    torch.testing.assert_close(peers["vllm"](1)[0], want, atol=1e-3, rtol=1e-3)
    assert peers["sglang"].startswith("left out: ")
