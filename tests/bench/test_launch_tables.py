"""The launch tables as a sweep sets them: tools/launch_tables.py on copies of the sources."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT
from tools import launch_tables

SOURCES = ROOT / "dflash_kernels" / "_triton"
TOOL = ROOT / "tools" / "launch_tables.py"

NOUNS = ("linear", "norm", "attention", "activation", "verify")


@pytest.fixture
def package(tmp_path):
    for noun in NOUNS:
        shutil.copy(SOURCES / f"{noun}.py", tmp_path)
    return tmp_path


def table(package, noun, name):
    return launch_tables.Table((package / f"{noun}.py").read_text(), name)


def entry(package, noun, name, path, best=None):
    now = table(package, noun, name).get(path)
    return {"table": f"{noun}.{name}", "key": path, "now": now, "best": best, "gain": 1.5 if best else 1.0,
            "tried": [{"value": "x", "gain": 1.5}]}


def swept(package, *entries, major=9):
    file = package / "sweep.json"
    file.write_text(json.dumps({"folder": "nvidia-h100", "major": major, "entries": entries}))
    return subprocess.run([sys.executable, TOOL, file, package], capture_output=True, text=True)


def test_an_entry_has_what_was_fastest_and_says_where(package):
    best = "Config(16, 1, 32, 128, 4, 6, 3)"
    key = next(iter(table(package, "attention", "CONFIGS").entries))
    generation = next(iter(table(package, "attention", "CONFIGS").entries[key][1]))
    tile = table(package, "attention", "CONFIGS").get((key, generation))
    before = {noun: (package / f"{noun}.py").read_text() for noun in NOUNS}
    done = swept(package, entry(package, "linear", "CONFIGS", ((2, 16),), best),
                 entry(package, "linear", "CONFIGS", ((2, 32),)), entry(package, "linear", "ADD_BLOCK", (), "1024"),
                 entry(package, "attention", "CONFIGS", (key, generation), tile.replace("True", "False")),
                 entry(package, "activation", "CONFIGS", (1 << 62,), "(2048, 4)"), major=generation)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 and best in done.stdout
    linear = table(package, "linear", "CONFIGS")
    assert linear.get(((2, 16),)) == best and table(package, "linear", "ADD_BLOCK").get(()) == "1024"
    text = (package / "linear.py").read_text()
    assert f"(2, 16): {best},  # measured on nvidia-h100\n" in text
    assert re.search(r"\(2, 32\): Config\(.*\),  # measured on nvidia-h100\n", text)
    assert re.search(r"\(2, 64\): Config\(.*\),\n", text), "nobody measured it"
    assert "ADD_BLOCK, ADD_WARPS = 1024, 4  #" in text and "; ADD_BLOCK measured on nvidia-h100\n" in text
    assert "1 << 62: (2048, 4),  # measured on nvidia-h100\n" in (package / "activation.py").read_text()
    for noun in NOUNS:  # nothing else has changed, and every line is of 120 characters at most
        after = (package / f"{noun}.py").read_text()
        assert max(map(len, after.splitlines())) <= 120
        defined = [[ast.dump(n) for n in ast.parse(t).body if not isinstance(n, ast.Assign)] for t in (before[noun],
                                                                                                       after)]
        assert defined[0] == defined[1]
    assert (package / "norm.py").read_text() == before["norm"]


def test_another_generation_s_entry_is_left_as_it_is(package):
    tables = table(package, "attention", "CONFIGS")
    key = next(k for k in tables.entries if k[:2] == (2, 2) and 9 not in tables.entries[k][1])
    kept = tables.get((key, 8))
    best = kept.replace("True", "False").replace("8, 5)", "4, 5)")
    assert swept(package, entry(package, "attention", "CONFIGS", (key, 8), best)).returncode == 0
    after = table(package, "attention", "CONFIGS")
    assert after.get((key, 8)) == kept and after.get((key, 9)) == best


def test_what_was_measured_before_is_still_said(package):
    assert swept(package, entry(package, "linear", "CONFIGS", ((2, 16),))).returncode == 0
    assert swept(package, entry(package, "linear", "CONFIGS", ((2, 64),))).returncode == 0
    assert swept(package, entry(package, "verify", "PROGRAMS", (), "264")).returncode == 0
    assert swept(package, entry(package, "verify", "PROGRAMS", (), "528")).returncode == 0
    assert (package / "linear.py").read_text().count("# measured on nvidia-h100") == 2
    line, = re.findall(r"^PROGRAMS.*$", (package / "verify.py").read_text(), re.M)
    assert line.startswith("PROGRAMS = 528 ") and line.count("measured on") == 1


def test_tables_that_have_changed_since_are_refused_and_nothing_is_written(package):
    good = entry(package, "linear", "CONFIGS", ((2, 16),), "Config(16, 1, 32, 128, 4, 6, 3)")
    stale = {**entry(package, "norm", "CONFIGS", (1024,), "8"), "now": "3"}
    before = (package / "linear.py").read_text()
    done = swept(package, good, stale)
    assert done.returncode == 2 and "norm.CONFIGS (1024,) must be 3, which was measured; got 4" in done.stderr
    assert done.stderr.count("\n") == 1 and (package / "linear.py").read_text() == before
    (package / "sweep.json").write_text("{")
    done = subprocess.run([sys.executable, TOOL, package / "sweep.json", package], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_an_entry_that_was_not_measured_says_nothing(package):
    before = (package / "linear.py").read_text()
    made = entry(package, "linear", "CONFIGS", ((2, 16),)) | {"tried": [{"value": "x", "why": "no room"}]}
    assert swept(package, made).returncode == 0 and (package / "linear.py").read_text() == before
