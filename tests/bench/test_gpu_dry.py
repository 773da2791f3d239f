"""The stand-in for a GPU, and the GPU's tests and benchmarks on it, on tiny shapes, with no package but those that a
machine with a GPU is sure to have, and numpy, which Triton's interpreter is made of."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from bench.peers import gpu_peers
from tests.support import ROOT

pytestmark = [pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed"),
              pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")]
needs_kernels = pytest.mark.skipif(not all(gpu_peers.versions().get(e) for e in gpu_peers.FILES),
                                   reason=f"{gpu_peers.folder()} has not both engines' kernels: make peer-kernels")


def bare(*words, **environment):
    """A command in a Python that finds torch, triton, pytest and ninja, and of the others none (tests/support/bare)."""
    paths = (ROOT / "tests/support/bare", ROOT, ROOT / "python")
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=500,
                          env={**os.environ, "PYTHONPATH": ":".join(map(str, paths)),
                               "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment})


def dry(*words, **environment):
    return bare("-m", "tools.dry_gpu", *words, ALSO_THERE="numpy", **environment)


def script(tmp_path, text, **environment):
    """What a script prints there, line by line."""
    file = tmp_path / "script.py"
    file.write_text(text)
    ran = dry(file, **environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


STAND_IN = """
import torch
import dflash_kernels as dk

def refused(function):
    try:
        function()
    except (RuntimeError, ValueError) as error:
        print(str(error).split(":")[0])

x, w = torch.randn(3, 64, device="cuda"), torch.randn(64).cuda()
print(x.device, x[1:, 3:].to("cpu").device, torch.tensor([1], device="cuda").device, dk.pack_weight(x).data.shape)
print(torch.allclose(dk.rms_norm(x, w).cpu(), dk.rms_norm(x.cpu(), w.cpu())))
refused(lambda: x + w.cpu())
refused(lambda: dk.rms_norm(x, w.cpu()))

def captured(step):
    graph = dk.StepGraph("cuda")
    with graph.capture():
        result = step()
    return graph, result

graph, y = captured(lambda: dk.rms_norm(x * 2, w, 1e-5) + 1)
x.copy_(torch.randn(3, 64))
print(torch.equal(y, dk.rms_norm(x * 2, w, 1e-5) + 1))
graph.replay()
print(torch.equal(y, dk.rms_norm(x * 2, w, 1e-5) + 1))
for sync in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x[x > 0], lambda: x.tolist()):
    refused(lambda: captured(sync))
with torch.device("cuda"):
    print(torch.zeros(2).device, torch.compile(lambda a: a.view(-1) * 2, fullgraph=True)(x).device)
"""


def test_it_refuses_what_a_gpu_refuses_and_replays_graphs(tmp_path):
    device = "Expected all tensors to be on the same device, but found cuda"
    capture = "operation not permitted when stream is capturing"
    assert script(tmp_path, STAND_IN) == [
        "cuda:0 cpu cuda:0 torch.Size([3, 64])", "True", device, "rms_norm", "False", "True", *[capture] * 4,
        "cuda:0 cuda:0"]


LOOP = """
import sys
import torch
from tests.support.decode_runs import random_target
from dflash_decode.model.drafter import Drafter
from dflash_decode.loop import Decoder
from dflash_decode.requests import Request
from dflash_decode.sampling import GREEDY
from dflash_decode.step import Step
from dflash_kernels import StepGraph

target = random_target("llama", torch.float32, "cuda", hidden=32, inner=32, heads=2, kv_heads=1, layers=1)
drafter = Drafter.random(target, num_layers=1, block_size=3)
events, ran = [], {"run": Step.run, "capture": StepGraph.capture, "replay": StepGraph.replay}

def note(owner, name):
    setattr(owner, name, lambda self, *rest: events.append(name) or ran[name](self, *rest))

for owner, name in ((Step, "run"), (StepGraph, "capture"), (StepGraph, "replay")):
    note(owner, name)

def text(decoder):
    return [token for e in decoder.stream([Request(0, [5, 6, 7], 6)]) for token in e.tokens]

decoder = Decoder(target, drafter, max_batch=1, max_context=16, page_size=4, prefill_rows=16)
decoder.warm_up([3], [GREEDY])
print(events)
graphs = [each.work.graph for each in (*decoder.runner.steps.values(), *decoder.runner.prefills.values())]
print([graph.captured for graph in graphs], len({graph._recording.pool() for graph in graphs}), graphs[0].pool)
events.clear()
warm = text(decoder)
print("capture" in events, "run" in events, events.count("replay") > 2)
StepGraph.available = staticmethod(lambda device: False)  # as without Triton
events.clear()
live = Decoder(target, drafter, max_batch=1, max_context=16, page_size=4, prefill_rows=16)
print(text(live) == warm, "capture" in events, events.count("run") > 1)
torch.cuda.mem_get_info = lambda device=None: (100_000, 1 << 40)
pages = Decoder(target, drafter, max_batch=8, max_context=512, page_size=4).pool.num_pages
print(pages, 80_000 // (4 * 2 * 4 * (16 + 16)))
"""


def test_the_loop_on_a_gpu_records_before_the_first_request_and_not_after(tmp_path):
    """A step's first call runs it once and then notes it, without a replay, for each width that steps can have; all
    graphs share a pool, prompts' passes among them; without kernels the loop stays live; pages are what fits."""
    said = script(tmp_path, LOOP)
    assert said == [
        "['capture', 'run', 'capture', 'run', 'run', 'capture', 'run']",
        "[True, True, True] 1 (0, 1)",
        "False False True",
        "True False True",
        "78 78",
    ], said


IMPORTS = """
import importlib, pathlib, sys
for file in (*pathlib.Path("bench/gpu").glob("*.py"), *pathlib.Path("bench/ops").glob("*.py"),
             *pathlib.Path("bench/peers").glob("gpu_*.py")):
    importlib.import_module(".".join(file.with_suffix("").parts))
import setup, tools.aot.ptxas
print(*(name for name in ("numpy", "hypothesis", "transformers", "safetensors", "gguf", "rich") if name in sys.modules))
"""


def test_the_gpu_s_tests_and_benchmarks_import_nothing_that_its_machine_has_not():
    """And the plant: this Python finds no package that we have and a bare machine has not."""
    ran = bare("-c", IMPORTS)
    assert (ran.returncode, ran.stdout) == (0, "\n"), ran.stderr
    planted = bare("-c", "import hypothesis")
    assert "No module named 'hypothesis'" in planted.stderr
    ran = bare("-m", "pytest", "tests/gpu", "--collect-only", "-p", "no:cacheprovider")
    assert ran.returncode == 0 and "error" not in ran.stdout, ran.stdout + ran.stderr
    for file in ROOT.glob("tests/gpu/test_*.py"):
        assert f"{file.name}: " in ran.stdout or f"{file.name}::" in ran.stdout, ran.stdout


def test_graphs_of_the_gpu_s_tests_are_replayed():
    ran = dry("-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "-k",
              "captured_step and f32 or captured_launch and f16 or p20")
    # The CUDA C++ kernel's steps are compiled with nvcc's headers.
    assert ran.returncode == 0 and re.search("[23] passed", ran.stdout), ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of the benchmarks, by op."""
    folder = tmp_path_factory.mktemp("results")
    kept = {f: f.read_bytes() for f in (ROOT / "bench/results").rglob("*.json")}
    names = ("memory", "attention", "draft", "whole", "blocks")
    ran = dry("-m", "bench.ops", *names, "--device", "cuda", "--tiny", "--runs", "1", "--folder", folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {f: f.read_bytes() for f in (ROOT / "bench/results").rglob("*.json")} == kept
    results = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    assert {r["header"]["device"] for r in results} == {"dry"}
    return {row["op"]: row for r in results for row in r["rows"]}


def test_the_benchmarks_run(rows):
    assert {"rms_norm", "add_rms_norm", "grouped_conv", "grouped_conv_add_rms_norm", "silu_and_mul", "qk_norm_rope",
            "write_context_kv", "embed_tokens", "prepare_block", "verify_greedy", "block_attention", "draft step",
            "draft layers", "draft head", "draft context", "baseline step", "verify pass", "DFlash step",
            "attention layer", "linear", "lm_head_argmax", "lm_head_topk"} == set(rows)
    assert all(row["us"] > 0 for row in rows.values())


TOOLS = """
import sys
from pathlib import Path
from bench.gpu import counters, profile, sweep

folder = Path(sys.argv[0]).parent
for module, words in ((sweep, [folder / "sweep.json"]), (sweep, ["-", "--share", "1/40"]), (counters, []),
                      (profile, [folder / "profile.json"])):
    sys.argv = [module.__name__, *map(str, words), "--tiny"]
    module.main()
"""


def test_a_sweep_s_result_sets_copies_of_the_tables(tmp_path):
    """And one share of what is compiled ahead, the kernels for Nsight Compute, and those of a replay, of which the
    stand-in has none."""
    said = script(tmp_path, TOOLS)
    swept = json.loads((tmp_path / "sweep.json").read_text())
    assert all(tried["gain"] > 0 for entry in swept["entries"] for tried in entry["tried"]), swept
    assert {line.split(",")[0] for line in said if "norm" not in line} >= {"linear", "block_attention"}, said
    assert len(json.loads((tmp_path / "profile.json").read_text())["steps"]) == 1
    for noun in ("linear", "norm"):
        shutil.copy(ROOT / f"dflash_kernels/_triton/{noun}.py", tmp_path)
    ran = bare("-m", "tools.launch_tables", tmp_path / "sweep.json", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [(tmp_path / f"{noun}.py").read_text().count("# measured on dry") for noun in ("linear", "norm")] == [1, 1]


@pytest.mark.parametrize("op", ["add_rms_norm", "silu_and_mul", "qk_norm_rope", "prepare_block", "verify_greedy"])
def test_torch_compile_agrees(rows, op):
    assert {"torch", "torch.compile"} <= set(rows[op]["peers"]), rows[op]["without"]


def test_sdpa_and_flex_attention_agree(rows):
    assert {"torch", "flex attention"} <= set(rows["block_attention"]["peers"]), rows["block_attention"]["without"]


@pytest.mark.parametrize("op,names", [("add_rms_norm", ["flashinfer"]),
                                      ("block_attention", ["flashinfer", "flash-attn"])])
def test_libraries_that_are_not_here_say_so(rows, op, names):
    missing = [name for name in names if not importlib.util.find_spec(name.replace("-", "_"))]
    if not missing:
        pytest.skip(f"{', '.join(names)}: installed")
    assert all("does not import" in rows[op]["without"][name] for name in missing)


@needs_kernels
@pytest.mark.parametrize("op,names", [
    ("verify_greedy", ["sglang", "vllm"]), ("prepare_block", ["sglang", "vllm"]), ("grouped_conv", ["vllm"]),
    ("write_context_kv", ["sglang, torch's cache writes", "vllm's cache writes, torch's norm and rope"])])
def test_the_engines_kernels_agree_with_ours(rows, op, names):
    for name in names:
        assert name in rows[op]["peers"], rows[op]["without"]


FAULTS = {  # file: what it says, and what it says instead
    "sglang/kernels/ops/speculative/dflash.py": [("commit_len = accept_len + 1", "commit_len = accept_len + 2"),
                                                 ("cols == 0, bonus_token", "cols == 1, bonus_token")],
    "sglang/kernels/ops/speculative/fused_kv_materialize.py": [("k_second * sin_v", "k_second * cos_v")],
    "vllm/v1/worker/gpu/spec_decode/dflash/speculator.py": [("query_pos = last_valid_pos + 1", "query_pos = 2")],
    "vllm/v1/attention/ops/triton_reshape_and_cache_flash.py": [("value_tile,\n", "key_tile,\n")],
    "vllm/model_executor/models/qwen3_dflash2.py": [("position = row % BLOCK_SIZE", "position = row")],
    "vllm/v1/worker/gpu/spec_decode/dflash2/speculator.py": [("previous = index", "previous = 0")],
}
PEERS = """
import sys
import torch
from bench.case import Sizes, measure
from bench.ops import memory as b, small

sizes = Sizes("cuda", True)
with torch.device("cuda"):
    g = b.GEOMETRIES["tiny"]["tiny"]
    made = [b.context_case(sizes, 5, g.layers, g.kv_heads, g.dim),
            b.block_case(sizes, g.requests, g.block, g.hidden, g.vocab),
            b.verify_case(sizes, g.requests, g.block, g.vocab), b.conv_case(sizes, 16, 64, False),
            small.select_case(sizes, 3, 4, 5, g.vocab)]
    for row in measure(made, 1, sizes):
        for name, why in row["without"].items():
            print("without", row["op"], name, why)
"""


@needs_kernels
def test_planted_faults_in_the_engines_kernels_are_seen(tmp_path):
    folder = tmp_path / "kernels"
    shutil.copytree(gpu_peers.folder(), folder)
    for path, faults in FAULTS.items():
        text = (folder / path).read_text()
        for right, wrong in faults:
            assert right in text, (path, right)
            text = text.replace(right, wrong)
        (folder / path).write_text(text)
    said = [line for line in script(tmp_path, PEERS, DFLASH_PEER_KERNELS=str(folder)) if line.startswith("without")]
    for what in ("write_context_kv sglang", "write_context_kv vllm", "prepare_block sglang", "prepare_block vllm",
                 "verify_greedy sglang", "grouped_conv vllm", "select_candidates vllm"):
        assert any(what in line and "differs" in line for line in said), (what, said)


def test_without_a_folder_the_engines_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLASH_PEER_KERNELS", str(tmp_path))
    gpu_peers.load.cache_clear()
    with pytest.raises(gpu_peers.Absent, match="make peer-kernels"):
        gpu_peers.load("vllm", gpu_peers.FILES["vllm"][0])
    assert gpu_peers.versions() == {}
