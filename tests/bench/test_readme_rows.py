"""README's five rows and the numbers in prose follow the results."""

import json
import shutil

import pytest

import dflash_kernels
from bench.report import commands, draw, kernel_tables, summary_table, values
from tests.support import ROOT

RESULTS = ROOT / "bench" / "results"


@pytest.fixture
def results(tmp_path):
    """A copy of the committed results whose figures a test may change."""
    return shutil.copytree(RESULTS, tmp_path / "results")


def file_of(results, name):
    """Of the machine that README's rows are of."""
    return kernel_tables.machines(results)[0] / f"{name}.json"


def change(results, name, edit):
    file = file_of(results, name)
    found = json.loads(file.read_text(encoding="utf-8"))
    edit(found)
    file.write_text(json.dumps(found), encoding="utf-8")


def test_rows_have_the_results_figures(results):
    change(results, "decode-c1", lambda r: r.update(tokens_per_s=321.4, speedup=2.79, identical_to_baseline=False,
                                                    different_requests=5))

    def slower(r):
        for row in r["rows"]:
            if (row["peer"], row["mode"], row["concurrency"]) == ("ours", "dflash", 32):
                row["tokens_per_s"] = 400.0
            if (row["peer"], row["mode"], row["concurrency"]) == ("ours", "baseline", 32):
                row["tokens_per_s"] = 800.0
    change(results, "peers", slower)
    rows = summary_table.headline(results).splitlines()
    assert "| 321 tokens/s | baseline decoding, 5 outputs differ," in rows[2] and rows[2].endswith("| 2.79 |")
    assert "32 requests" in rows[4] and "| 400 tokens/s | baseline decoding, 800 tokens/s | 0.50 |" in rows[4]


@pytest.mark.parametrize("missing", ["decode*-c1", "decode-c8", "peers*", "linear"])
def test_there_are_five_rows_or_none(results, missing):
    shutil.rmtree(kernel_tables.machines(results)[1])
    for file in kernel_tables.machines(results)[0].glob(f"{missing}.json"):
        file.unlink()
    assert summary_table.headline(results) == kernel_tables.EMPTY


def test_more_files_of_another_machine_change_no_number_in_prose(results):
    other = kernel_tables.machines(results)[1]
    for i in range(40):
        shutil.copy(file_of(results, "small"), other / f"small-{i}.json")
    assert values.values(results) == values.values(RESULTS)


def test_numbers_in_prose_follow_the_results(results):
    before = values.values(results)
    assert before == values.values(RESULTS)

    def twice(r):
        for row in r["rows"]:
            row["us"] *= 2
    change(results, "step", twice)
    change(results, "decode-c8", lambda r: r.update(speedup=1.25))
    after = values.values(results)
    assert after["all-c8"] == "1.25" and float(after["verify-steps"]) == pytest.approx(
        2 * float(before["verify-steps"]), abs=0.02)
    assert {name for name in after if after[name] != before[name]} == {"all-c8", "verify-steps", "dflash-steps",
                                                                        "draft-steps"}


def test_prose_agrees_with_the_tables():
    """The share that a table shows for an op is the one that the prose names."""
    shown, table = values.values(RESULTS), kernel_tables.limits_block(RESULTS)
    for op, name in (("baseline step", "share-baseline-step"), ("block_attention", "share-block_attention")):
        row = next(line for line in table.splitlines() if line.startswith(f"| `{op}` |"))  # of the prose's machine
        assert f" {shown[name]} |" in row
    assert f"| {shown['verify-steps']} baseline steps |" in table
    assert f"| {shown['dflash-steps']} baseline steps |" in table


@pytest.mark.parametrize("recorded, today", [
    ("python bench/run.py linear --runs 15 --device cpu", 'make bench ARGS="linear --runs 15 --device cpu"'),
    ("python -m bench.ops linear --runs 15", 'make bench ARGS="linear --runs 15"'),
    ("python bench/peers/run.py --prompts a.jsonl b.jsonl --drafter auto", 'make peers PROMPTS="a.jsonl b.jsonl" '
                                                                         'ARGS="--drafter auto"'),
    ("python -m bench.peers --prompts a.jsonl --limit 2", 'make peers PROMPTS="a.jsonl" ARGS="--limit 2"'),
    ("DFLASH_ISA=avx2 python -m bench.peers --prompts a.jsonl --limit 2",
     'DFLASH_ISA=avx2 make peers PROMPTS="a.jsonl" ARGS="--limit 2"'),
    ("python -m bench.peers --prompts mt_bench.jsonl gsm8k.jsonl math500.jsonl humaneval.jsonl --limit 2",
     'make peers ARGS="--limit 2"'),
    ("python -m bench.peers --prompts gsm8k.jsonl a.jsonl --limit 2",
     'make peers PROMPTS="bench/prompts/gsm8k.jsonl a.jsonl" ARGS="--limit 2"'),
    ("python x", "python x")])
def test_a_recorded_command_is_shown_as_it_runs_today(recorded, today):
    assert commands.command_of(recorded) == today


def test_the_picture_names_ops():
    drawn = {op for _, ops, _ in draw.STEP for op in ops if " " not in op}
    assert drawn <= set(dflash_kernels.__all__) and len(drawn) == 9
