"""The step model: each term counted by hand, and its bytes against those of packed weights that benchmarks counted."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dflash_kernels as dk
from bench import RESULTS
from bench.model import step as m
from bench.model import tables
from bench.random_model import random_drafter, random_target
from dflash_decode.step import Step
from tests.support.launches import launches

SMOL, QWEN, MINIMAX = (m.GEOMETRIES[name] for name in ("smollm2", "qwen3-8b", "minimax-m2.7"))
UNIT = m.Machine("unit", gbps=1, tflops=1e9, link_gbps=1, memory=1000, share=1.0, reduce_us=0.0, gap_us=0.0)


def test_weights_of_a_dense_layer():
    layer = m.Layers(1, hidden=10, heads=4, kv_heads=2, head_dim=5, mlp=7)
    # q 10x20, k and v 10x10 each, o 20x10, gate, up and down 10x7 each
    assert layer.weights(1) == layer.weights(99) == layer.active() == 200 + 200 + 200 + 210
    assert replace(layer, layers=3).weights(1) == 3 * 810
    assert layer.kv_bytes() == 2 * 2 * 5 * 2 and layer.attention_flops(100) == 4 * 4 * 5 * 100


def test_experts_that_a_batch_covers():
    layer = m.Layers(1, 10, 4, 2, 5, 7, experts=256, chosen=8)
    assert layer.coverage(1) == pytest.approx(8)
    assert layer.coverage(2) == pytest.approx(16 - 8 * 8 / 256)  # the second token's overlap with the first's
    assert layer.coverage(10**6) == pytest.approx(256) and layer.coverage(0) == 0
    assert all(layer.coverage(n) < min(8 * n, 256) for n in range(2, 300))
    assert layer.weights(1) == pytest.approx(600 + 8 * 210 + 10 * 256) == pytest.approx(layer.active())


def test_geometries_have_the_sizes_that_are_known():
    assert SMOL.target.weights(1) + SMOL.head == 134_479_872
    assert QWEN.target.weights(1) + 2 * QWEN.head == pytest.approx(8.19e9, rel=0.01)
    whole = MINIMAX.target.weights(10**9) + 2 * MINIMAX.head
    assert whole == pytest.approx(229e9, rel=0.01)  # 229 B, of which 10 B a token
    assert MINIMAX.target.active() + MINIMAX.head == pytest.approx(10.4e9, rel=0.02)
    assert MINIMAX.draft.weights(1) + MINIMAX.features == pytest.approx(0.6e9, rel=0.1)


def test_bytes_are_those_of_packed_weights():
    """The step benchmark counts what it packs; a baseline step and a verify pass read exactly that."""
    folder = next((f for f in RESULTS.iterdir() if (f / "step.json").is_file()), None)
    if folder is None:
        pytest.skip("no step was measured")
    rows = {r["op"]: r for r in json.loads((folder / "step.json").read_text())["rows"]}
    counted = rows["baseline step"]["gbps"] * rows["baseline step"]["us"] * 1e3
    assert m.step(SMOL, UNIT, 1, 0, block=1, drafting=False).total * 1e3 == pytest.approx(counted)


def test_a_step_adds_up():
    s = m.step(QWEN, UNIT, 4, 1000)
    t, d = QWEN.target, QWEN.draft
    assert s.verify == pytest.approx((2 * t.weights(64) + 2 * 151936 * 4096) / 1e3)
    assert s.verify_kv == pytest.approx(4 * 1000 * 36 * 2 * 8 * 128 * 2 / 1e3)
    assert s.draft == pytest.approx(2 * d.weights(1) / 1e3) and s.draft_head == pytest.approx(2 * QWEN.head / 1e3)
    assert s.draft_kv == pytest.approx(s.verify_kv * 5 / 36)
    assert s.draft_context == pytest.approx(2 * (5 * 4096 * 4096 + 5 * 2 * 4096 * 8 * 128) / 1e3)
    assert (s.all_reduce, s.gaps) == (0, 0) and s.total == pytest.approx(sum(vars(s).values()))
    assert s.tokens_per_s(4, 2.5) == pytest.approx(10 / s.total * 1e6)


def test_many_rows_wait_for_the_arithmetic():
    slow = replace(UNIT, gbps=1e9, tflops=1)
    s = m.step(QWEN, slow, 4, 0)
    assert s.verify == pytest.approx(2 * 64 * (QWEN.target.active() + QWEN.head) / 1e6)
    one_byte = m.step(replace(QWEN, element=1), slow, 4, 0)  # fp8 layers run at twice the rate, the head does not
    assert one_byte.verify == pytest.approx(64 * (QWEN.target.active() + 2 * QWEN.head) / 1e6)


def test_tensor_parallelism_divides_and_reduces():
    one, four = (m.step(QWEN, replace(UNIT, reduce_us=5.0), 2, 1000, tp=tp) for tp in (1, 4))
    assert one.all_reduce == 0
    for part in ("verify", "verify_kv", "draft", "draft_kv", "draft_head", "draft_context"):
        assert getattr(four, part) == pytest.approx(getattr(one, part) / 4)
    moved = 2 * 3 / 4 * 32 * 4096 * 2
    assert four.all_reduce == pytest.approx(2 * (36 + 5) * (5.0 + moved / 1e3))


def test_baseline_decoding_has_no_draft():
    s = m.step(QWEN, m.MACHINES["H100"], 1, 500, block=1, tp=2, drafting=False)
    assert s.draft == s.draft_kv == s.draft_head == s.draft_context == 0
    assert s.gaps == 474 * 1.0 and s.all_reduce > 0


@pytest.mark.parametrize("batch", [1, 8])
def test_launches_are_those_of_a_step(batch):
    """On meta tensors, at Qwen3-8B's geometry with room for 40,960 tokens: 510 and 591 while K was shared out whatever
    the number of rows."""
    pytest.importorskip("triton")
    target = random_target(QWEN, "meta", torch.bfloat16, 40960)
    drafter = random_drafter(QWEN, target)
    caches = [made.cache.allocate(64, 16) for made in (target, drafter)]
    for drafting, width in ((False, 1), (False, QWEN.block), (True, QWEN.block)):
        made = (drafter, *caches) if drafting else (None, caches[0], ())
        with launches() as noted:
            Step(target, *made, batch, width, 16, 2560).run()
        assert len(noted) == m.launches(QWEN, drafting)
    assert (m.launches(QWEN, False), m.launches(QWEN)) == (474, 550)


def test_launches_of_an_mlp_and_of_experts():
    pytest.importorskip("triton")

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    t = MINIMAX.target
    x, counts = empty(8, t.hidden), []
    weights = empty(t.experts, 2 * t.mlp, t.hidden), empty(t.experts, t.hidden, t.mlp)
    with launches() as noted:
        dk.expert_mlp(x, *weights, *dk.route_experts(dk.linear(x, empty(t.experts, t.hidden)), t.chosen))
        counts.append(len(noted))
    q = QWEN.target
    with launches() as noted:
        x = empty(8, q.hidden)
        dk.linear(dk.silu_and_mul(dk.linear(x, empty(2 * q.mlp, q.hidden))), empty(q.hidden, q.mlp))
        counts.append(len(noted))
    assert counts[0] - counts[1] == m.MORE_KERNELS_OF_EXPERTS
    assert m.launches(MINIMAX, False) == 62 * (13 + 1) + 6
    for rows in (256, 257):
        pairs = [empty(rows, t.chosen, dtype=dtype) for dtype in (torch.int32, torch.float32)]
        with launches() as noted:
            dk.expert_mlp(empty(rows, t.hidden), *weights, *pairs)
        assert len(noted) - 2 == (m.launches(MINIMAX, False, rows) - m.launches(MINIMAX, False)) / t.layers


def test_the_experts_that_a_benchmark_read_are_as_many_as_the_model_expects():
    files = list(RESULTS.glob("*/experts.json"))
    if not files:
        pytest.skip("no experts were measured")
    found = re.compile(r"(minimax-m2.7|qwen3-coder-30b-a3b), \d+ experts, random, (\d+) rows")
    sizes = {"minimax-m2.7": m.Layers(1, 3072, 48, 8, 128, 1536, experts=64, chosen=8),
             "qwen3-coder-30b-a3b": m.Layers(1, 2048, 32, 4, 128, 768, experts=128, chosen=8)}
    for row in (row for file in files for row in json.loads(file.read_text())["rows"]):
        if match := found.fullmatch(row["case"]):
            layer, moved = sizes[match[1]], row["gbps"] * row["us"] * 1e3
            assert moved / (2 * layer.mlp_weights) == pytest.approx(layer.coverage(int(match[2])), rel=0.05)


def test_the_roofline_is_a_limit():
    for machine in m.MACHINES.values():
        for g in m.GEOMETRIES.values():
            for tp in (1, 8):
                ideal, real = (m.step(g, x, 8, 2000, tp=tp) for x in (machine.ideal(), machine))
                assert ideal.total < real.total and math.isfinite(ideal.total)


def test_acceptance_of_a_histogram():
    assert m.acceptance_of([1, 0, 3]) == 2.5 and m.acceptance_of([1, 0, 3], 2) == 1.75
    assert m.acceptance_of([1, 0, 3], 1) == 1.0 and m.acceptance_of([0, 0]) == 1.0


def test_what_fits():
    assert m.fits(QWEN, m.MACHINES["H100"], 1) and not m.fits(MINIMAX, m.MACHINES["H100"], 2)
    assert m.fits(MINIMAX, m.MACHINES["H100"], 4) and m.fits(MINIMAX, m.MACHINES["B200"], 2)


def planted(folder: Path):
    def write(name, rows):
        (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))

    folder.mkdir()
    write("linear", [{"op": "linear", "case": f"smollm2 {name}{bits}, {n} rows", "us": us, "gbps": share / 10,
                      "pct_of_limit": share} for name in ("head 49152x576", "down 576x1536")
                     for n, us in ((1, 100), (8, 100), (16, 180)) for bits, share in (("", 50.0), (" in 8 bits", 40))])
    write("attention", [{"op": "block_attention", "case": f"smollm2 context 512, Q {n}", "gbps": 2.0} for n in (1, 8)])
    write("step", [{"op": op, "case": f"SmolLM2, context {c}", "us": 1000.0} for op, c in
                   (("baseline step", 0), ("baseline step", 100), ("verify pass", 0), ("DFlash step", 0),
                    ("DFlash step", "1, in 8 bits"))])
    (folder / "decode-c8.json").write_text(json.dumps({
        "model": "smollm2", "block_size": 8, "baseline_tokens_per_s": 100.0, "tokens_per_s": 200.0,
        "acceptance_length": 2.0}))
    return folder


def test_checks_against_planted_results(tmp_path):
    folder = planted(tmp_path / "machine")
    p = tables.parts(folder)
    assert p.limit == pytest.approx(10.0) and p.attention == {1: 2.0, 8: 2.0}
    assert p.linear == {element: {1: share, 8: share, 16: share} for element, share in ((1, 0.4), (2, 0.5))}
    assert p.row_s == pytest.approx(80e-6 / 8 / (49152 * 576))
    found = {what: (measured, model) for what, measured, model, _ in tables.checks(folder)}
    weights = 2 * 134_479_872 / 5e9 * 1e6  # at half of 10 GB/s
    assert found["baseline step, context 0"] == (1000.0, pytest.approx(weights))
    assert found["baseline step, context 100"][1] == pytest.approx(weights + 100 * 30 * 2 * 3 * 64 * 2 / 2e3)
    assert found["verify pass, context 0"][1] == pytest.approx(weights)  # 8 rows: bytes alone
    draft = SMOL.draft.weights(1) + SMOL.features + SMOL.draft_head + 3 * SMOL.draft.kv_weights
    assert found["DFlash step, context 0"][1] == pytest.approx(weights + 2 * draft / 5e3)
    keys = (30 + 3) * 2 * 3 * 64 * 2 / 2e3
    assert found["DFlash step, context 1"][1] == pytest.approx(weights + draft / 4e3 + keys)
    measured, model = found["DFlash decoding, concurrency 8"]
    assert measured == 200.0 and 0 < model < 8 * 2 / (weights / 1e6)
    assert p.product(1e6, 64) == pytest.approx(p.product(1e6, 16) + 48 * 1e6 * p.row_s * 1e6)
    text = "\n".join(tables.check_table(tmp_path))
    assert "| verify pass, context 0 | 1000 µs | 53792 | +5279% |" in text


def test_a_folder_without_the_measurements_gives_no_table(tmp_path):
    (tmp_path / "empty").mkdir()
    folder = planted(tmp_path / "machine")
    (folder / "attention.json").unlink()
    assert tables.check_table(tmp_path) == [] and tables.tables(tmp_path)


def test_the_card_is_beside_the_prediction():
    text = "\n".join(tables.card_table())
    assert "| minimax-m2.7, 4 x B200 | 1 | 3.561 | 331 |" in text and "| 32 | 3.66 | 4423 |" in text


def test_the_command(tmp_path):
    result = tmp_path / "r.json"
    result.write_text(json.dumps({"acceptance_histogram": [1, 1]}))
    command = [sys.executable, "-m", "bench.model", "--geometry", "minimax-m2.7", "--tp", "4"]
    done = subprocess.run([*command, "--histogram", str(result), "--batch", "2"], capture_output=True, text=True)
    s = m.step(MINIMAX, m.MACHINES["B200"], 2, 2000, tp=4)
    assert f"batch 2, expected: {s.tokens_per_s(2, 1.5):.0f} tokens/s" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "exactly one of" in done.stderr
