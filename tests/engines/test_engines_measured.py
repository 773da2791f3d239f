"""What is on by itself was measured: a results file in the repository says so, and the table in docs/engines.md."""

import json
import re

import pytest

from dflash_engines import sglang, vllm
from tests.support import ROOT

HOOKS = [(engine, hook) for engine, plugin in (("vllm", vllm), ("sglang", sglang)) for hook in plugin.hooks()]
EACH = pytest.mark.parametrize("engine, hook", HOOKS, ids=[f"{engine}-{hook.name}" for engine, hook in HOOKS])


def measured(engine):
    """The platforms with a committed run of the engine: its header names the CPU, or the GPU's generation ("sm_90")."""
    headers = [json.loads(file.read_text())["header"] for file in ROOT.glob(f"bench/results/*/engine-{engine}.json")]
    return {header.get("generation", "cpu") for header in headers}


def table():
    """Of each engine and hook in docs/engines.md, the cells for a CPU and for a GPU."""
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (vLLM|SGLang)[^|]*\| (\w+) \|.*\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    return {(engine.lower(), hook): cells for engine, hook, *cells in rows}


@EACH
def test_no_hook_is_measured_where_no_results_are_committed(engine, hook):
    assert set(hook.measured) <= measured(engine)


@EACH
def test_the_table_says_where_a_hook_is_on_by_itself(engine, hook):
    on = [hook.measured.get("cpu", False), any(hook.measured[name] for name in hook.measured if name != "cpu")]
    assert [cell.partition(":")[0] for cell in table()[engine, hook.name]] == ["yes" if each else "no" for each in on]
