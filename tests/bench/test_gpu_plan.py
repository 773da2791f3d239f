"""What `make gpu` runs, in which order and time, what it refuses, and that a run that is cut off leaves its results."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import setup
from bench.gpu import build as gpu_build
from bench.gpu import entries as gpu_entries
from bench.gpu import jobs as gpu_jobs
from bench.gpu import parts as gpu
from bench.gpu import plan as gpu_plan
from bench.gpu import profile as gpu_profile
from bench.gpu import summary as gpu_summary
from bench.ops import whole as bench_whole
from dflash_kernels import build_info
from tests.support import ROOT

PARTS = list(gpu_plan.SHARES)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


def ended(pid):
    """Waits for the end of a process; one that does not end is ended with the test, when pytest's time is up."""
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.1)


def plan(monkeypatch, *words):
    """Exit status, and the commands that would have run."""
    ran = []
    monkeypatch.setattr(gpu_jobs.Jobs, "run", lambda jobs, words, end, workers=1, environment=None:
                        ran.append(words) or "passed")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    return gpu.main(), ran


@no_gpu
def test_the_dry_run_is_the_whole_plan_on_the_stand_in(monkeypatch, tmp_path, capsys):
    code, ran = plan(monkeypatch, "dry", "--out", str(tmp_path))
    assert code == 0
    ran = [words for words in ran if "setup.py" not in words]
    wet = [step for part in PARTS for step in gpu_plan.steps(part, tmp_path, False, True)]
    on_gpu_alone = [step for step in wet if step.name in gpu_plan.CHECKS]
    assert len(ran) == len(wet) - len(on_gpu_alone) and len(on_gpu_alone) == 2
    for words in ran:
        assert words[:3] == [sys.executable, "-m", "tools.dry_gpu"]
        assert ("--tiny" in words) == (words[4] != "pytest")
    modules = {word for step in wet for word in step.words if word.startswith("bench.")}
    assert modules == {word for words in ran for word in words if word.startswith("bench.")} and len(modules) == 4
    out = capsys.readouterr().out
    assert "memcheck: left out, as there is no GPU" in out
    assert json.loads((tmp_path / "plan.json").read_text())["commands"]["b profile"] == "passed"
    assert out.endswith((tmp_path / "summary.txt").read_text()) and len(list(tmp_path.iterdir())) <= 8


@no_gpu
def test_parts_run_alone_and_without_peers(monkeypatch, tmp_path):
    def names(*words):
        ran = plan(monkeypatch, "dry", *words, "--out", str(tmp_path))[1]
        return [" ".join(w) for w in ran if "setup.py" not in w]

    only, = names("c")
    assert "bench.gpu.sweep" in only
    assert all("--no-peers" in words for words in names("a") if "bench.ops" in words)
    with_peers, experts, beside = names("f")
    assert "memory small sample" in with_peers and "linear attention" in beside and "--no-peers" not in with_peers
    assert "experts" in experts and names("f", "--no-peers")[1:] == [experts]
    assert "--no-peers" in names("f", "--no-peers")[0]


def test_every_part_has_its_share_and_all_end_within_nine_minutes(monkeypatch, tmp_path):
    assert sum(gpu_plan.SHARES.values()) <= gpu_plan.BUDGET <= 9 * 60 - 10
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_build, "prebuilt", lambda: False)
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name: f"/bin/{name}")
    ends, now = [], [0.0]

    def run(jobs, words, end, workers=1, environment=None):
        """It takes all that it may, and building a minute."""
        now[0] = 60.0 if "setup.py" in words else max(now[0], end)
        ends.append(now[0])
        return "out of time"

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_jobs.Jobs, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 1
    assert ends[-1] <= gpu_plan.BUDGET and sorted(ends) == ends
    share = gpu_plan.SHARES["a"] / sum(gpu_plan.SHARES.values())
    assert ends[4] <= 60 + share * (gpu_plan.BUDGET - 60) + 1
    ends.clear()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "f", "--out", str(tmp_path)])
    now[0] = 0.0
    assert gpu.main() == 1 and ends[-1] == gpu_plan.BUDGET  # a part alone has all of it


def test_memcheck_sees_every_allocation_and_racecheck_the_kernels_that_share_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name: f"/bin/{name}")
    steps = {step.name: step for step in gpu_plan.steps("e", tmp_path, False, True)}
    assert steps["memcheck"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert steps["memcheck"].words[:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"]
    assert "racecheck" in steps["racecheck"].words
    chosen = steps["racecheck"].words[-1]
    assert all(name in chosen for name in ("10000", "verify_sample", "block_attention"))
    monkeypatch.setattr(gpu_plan.shutil, "which", lambda name: None)
    missing = gpu_plan.steps("d", tmp_path, False, True) + gpu_plan.steps("e", tmp_path, False, True)
    assert [step.absent for step in missing if step.absent] == ["ncu is not installed"] + 2 * [
        "compute-sanitizer is not installed"]


@no_gpu
@pytest.mark.parametrize("words,said", [
    (["everything"], "a part must be dry or one of a, b, c, d, e, f; got everything"),
    (["dry", "a", "ops"], "got ops"), (["a"], "make gpu needs a GPU that torch can use; torch"),
    (["dry", "--out", "FILE/results"], "OUT must be a folder that can be written to; got"),
    (["dry", "--out", "FILE"], "OUT must be a folder"), (["dry", "--out", "/proc/results"], "OUT must be a folder")])
def test_bad_input_is_one_line_and_nothing_is_written(monkeypatch, tmp_path, capsys, words, said):
    file = tmp_path / "file"
    file.write_text("kept")
    code, ran = plan(monkeypatch, *(word.replace("FILE", str(file)) for word in words))
    err = capsys.readouterr().err
    assert (code, ran) == (2, []) and said in err and err.count("\n") == 1
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and file.read_text() == "kept"


@no_gpu
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_refused(monkeypatch, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert plan(monkeypatch, "dry", "--out", str(tmp_path)) == (2, [])
    assert "Permission denied" in capsys.readouterr().err and not list(tmp_path.iterdir())


@no_gpu
@needs_triton
def test_a_run_that_is_killed_has_left_every_finished_case(tmp_path):
    words = [sys.executable, "-m", "bench.gpu", "dry", "f", "--no-peers", "--out", tmp_path]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"})
    log = tmp_path / "log.txt"

    def finished():
        return re.findall(r"^(\S+) +(\S.*?) +[\d.]+ us \[", log.read_text() if log.exists() else "", re.M)

    while len(finished()) < 2 and process.poll() is None:
        time.sleep(0.02)
    command, = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ended(command)
    said = finished()
    assert len(said) >= 2
    rows = {(row["op"], row["case"]) for row in json.loads((tmp_path / "cases.json").read_text())["rows"]}
    assert set(said) <= rows


def test_jobs_tell_what_failed_and_end_in_time(tmp_path, monkeypatch, capsys):
    """No time is the machine's: the clock is told when the child has said that it is there."""
    (tmp_path / "log.txt").touch()
    jobs = gpu_jobs.Jobs(tmp_path / "log.txt")

    now = [0.0]
    monkeypatch.setattr(gpu_jobs, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def run(code, **options):
        return jobs.run([sys.executable, "-c", code], 600.0, **options)

    assert run("") == "passed, 0 s"
    assert run("print('why'); raise SystemExit(3)").startswith("failed (3)") and "  why\n" in capsys.readouterr().out
    child = "import subprocess as s; p = s.Popen(['sleep', '600']); print('child', p.pid, flush=True); p.wait()"
    with monkeypatch.context() as patch:
        wait = subprocess.Popen.wait

        def once_it_is_there(process, timeout=None):
            """As the child's time passes: it is up when the child has a child."""
            while timeout and process.poll() is None and not re.search(r"^child \d+\n", jobs.log.read_text(), re.M):
                time.sleep(0.02)
            now[0] = 600.0
            return wait(process, 0 if timeout else None)

        patch.setattr(subprocess.Popen, "wait", once_it_is_there)
        assert run(child) == "out of time, 600 s" and jobs.processes == []
    now[0] = 0.0
    assert ended(re.search(r"^child (\d+)", jobs.log.read_text(), re.M)[1])
    assert jobs.run([], 0.0) == "out of time before it began"
    share = "import os; s = os.environ['DFLASH_SHARE']; print('share', s); raise SystemExit(s == {!r})"
    assert run(share.format("none"), workers=2).startswith("passed")
    assert [line for line in jobs.log.read_text().splitlines() if line.startswith("share")] == ["share 0/2",
                                                                                               "share 1/2"]
    assert run(share.format("1/2"), workers=2).startswith("failed (1)")
    jobs.log.write_bytes(b"x" * (gpu_jobs.MOST + 10))
    run("")
    assert jobs.log.stat().st_size < gpu_jobs.MOST


def test_a_library_of_these_sources_is_not_built_again(tmp_path, monkeypatch):
    def library(name, mark):
        (tmp_path / f"{name}.abi3.so").write_bytes(b"\0ELF" + mark.encode() + b"\0")

    assert not gpu_build.prebuilt(tmp_path, nvcc=False)
    library("_C", setup.sources_mark())
    assert gpu_build.prebuilt(tmp_path, nvcc=False) and not gpu_build.prebuilt(tmp_path, nvcc=True)
    library("_cuda", setup.sources_mark())
    assert gpu_build.prebuilt(tmp_path, nvcc=True)
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copy(ROOT / "setup.py", tree)
    monkeypatch.setattr(setup, "ROOT", tree)
    assert gpu_build.prebuilt(tmp_path, nvcc=True)
    next((tree / "csrc" / "cpu").glob("*.cpp")).open("a").write("\n")
    assert not gpu_build.prebuilt(tmp_path, nvcc=True)


def test_the_built_library_carries_its_sources_mark():
    library = ROOT / "dflash_kernels" / "_C.abi3.so"
    if not library.exists() or os.environ.get("DFLASH_SANITIZE"):
        pytest.skip("the library is not built, or not as it ships")
    assert setup.sources_mark().encode() in library.read_bytes()
    assert setup.sources_mark().split()[2][:12] == build_info()["sources"]


def test_a_replay_s_kernels_and_gaps_are_its_time():
    found = gpu_profile.table([("b", 14.0, 20.0), ("a", 0.0, 10.0), ("a", 25.0, 30.0), ("c", 18.0, 22.0)])
    assert (found["launches"], found["us"], found["kernels_us"], found["gaps_us"]) == (4, 30.0, 23.0, 7.0)
    assert [tuple(k.values()) for k in found["kernels"]] == [("a", 2, 15.0), ("b", 1, 6.0), ("c", 1, 4.0)]
    assert gpu_profile.table([])["us"] == 0.0


def test_a_block_s_first_row_must_be_the_baseline_step_s():
    ids, values = torch.tensor([3, 4]), torch.tensor([1.5, 2.5])
    check = bench_whole.as_baseline([ids, values])
    check((ids.clone(), values.clone()))
    above = values.nextafter(torch.tensor(9.0))
    for wrong, said in (((ids + 1, values), "not the baseline"), ((ids, above), "not the baseline"),
                        ((ids, values / 0), "not finite")):
        with pytest.raises(AssertionError, match=said):
            check(wrong)


@needs_triton
def test_every_row_of_every_table_is_swept_against_its_neighbours():
    from tools.aot import compile as _aot

    every = gpu_entries.entries(False, 9)
    for noun in _aot.NOUNS:
        module = importlib.import_module(f"dflash_kernels._triton.{noun}")
        missing = {key for key in vars(module).get("CONFIGS", ()) if module.__name__.endswith(noun)
                   and not any(e.noun == noun and e.path[:1] == (key,) for e in every)}
        assert missing <= {1024, "ids"}, (noun, missing)  # heads over 256, and a launch of one warp
    assert all(gpu_entries.neighbours(entry.value) for entry in every)
    linear = next(entry for entry in every if entry.noun == "linear")
    for value in gpu_entries.neighbours(linear.value):
        assert sum(a != b for a, b in zip(value, linear.value, strict=True)) == 1
        assert (value.ROWS, value.TILES) == (linear.value.ROWS, linear.value.TILES)
    before = linear.value
    with linear.set_to(value):
        assert linear.value == value != before
    assert linear.value == before


def test_the_summary_is_a_page(tmp_path):
    row = {"op": "linear", "case": "c", "us": 10.0, "floor_us": 8.0, "pct_of_limit": 80.0, "peers": {"torch": 20.0}}
    cases = {"header": {"device": "H", "torch": "2", "triton": "3", "copy_gbps": 3000.0, "matrix_tflops": 700.0,
                        "commit": "abc"},
             "rows": [{"op": "head", "case": "d", "wrong": "result 0: other integers", "commit": "abc"},
                      *[row | {"commit": "abc"}] * 197, *[row | {"commit": "old"}] * 3]}
    entry = {"table": "linear.CONFIGS", "key": [[2, 16]], "now": "A", "best": "B", "gain": 1.25, "tried": [{}]}
    sweep = {"commit": "abc", "entries": [entry, {**entry, "best": None, "tried": []}]}
    step = {"step": "a baseline step", "us": 30.0, "kernels_us": 23.0, "gaps_us": 7.0, "launches": 4,
            "kernels": [{"name": "k", "us": 23.0, "count": 4}]}
    profile = {"commit": "abc", "steps": [step]}
    files = {"cases": cases, "sweep": sweep, "profile": profile,
             "plan": {"commit": "abc", "seconds": 500, "commands": {"a linear": "passed, 3 s"}}}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    text = gpu_summary.page(tmp_path)
    assert text.count("\n") < 100 and max(map(len, text.splitlines())) <= 160
    for said in ("make gpu at abc, 500 s:", "WRONG head d: result 0", "10.0      8.0   80 %  2.00 x torch",
                 "and 124 more in cases.json", "3 of these are of an earlier commit",
                 "of a baseline step: 30 us, 23 in 4 kernels, 7 in gaps",
                 "2 entries, 1 settings, 1 are better", "linear.CONFIGS [[2, 16]]: B in place of A, 1.25 x as fast"):
        assert said in text, said
    assert gpu_summary.page(tmp_path / "none") == "\n"
