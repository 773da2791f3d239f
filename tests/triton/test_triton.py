"""Runs the tests that interpret the GPU kernels, several files in a process that interprets (see conftest.py)."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from dflash_kernels import _library
from dflash_kernels._triton import LAUNCHERS
from tests.support import ROOT

FILES = {path.stem.removeprefix("test_triton_") for path in ROOT.glob("tests/triton/test_triton_*.py")} - {"aot"}
# A process takes seconds to start. The longest group comes first.
GROUPS = {"attention": ["attention"], "sample": ["sample", "verify"], "products": ["linear", "lm_head", "context"]}
GROUPS["others"] = sorted(FILES.difference(*GROUPS.values()))


def test_every_op_has_a_launcher_and_every_noun_a_file():
    assert set(LAUNCHERS) == set(_library.NAMES)
    nouns = {where.split(":")[0].removesuffix("_topk") for where in LAUNCHERS.values()}  # one file tests both heads
    assert nouns <= FILES


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group, interpreted):
    ran = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider",
                          *(f"tests/triton/test_triton_{name}.py" for name in GROUPS[group])], cwd=ROOT,
                         capture_output=True, text=True, timeout=580,
                         env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed, skipped = (re.search(rf"(\d+) {how}", ran.stdout) for how in ("passed", "skipped"))
    interpreted((int(passed[1]), int(skipped[1]) if skipped else 0))
