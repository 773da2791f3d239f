"""Runs the tests that interpret the GPU kernels, each file in a process that interprets (see conftest.py)."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from dflash_kernels import _library
from dflash_kernels._triton import LAUNCHERS
from tests.support import ROOT

NOUNS = sorted({where.split(":")[0].removesuffix("_topk") for where in LAUNCHERS.values()})  # one file tests both heads


def test_every_op_has_a_launcher():
    assert set(LAUNCHERS) == set(_library.NAMES)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("noun", [*NOUNS, "attention_split", "no_token", "sample_engines", "engines",
                                  "engines_vllm", "far", "specialised"])
def test_interpreted(noun, interpreted):
    ran = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider",
                          f"tests/triton/test_triton_{noun}.py"], cwd=ROOT, capture_output=True, text=True,
                         timeout=580, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    interpreted(int(re.search(r"(\d+) passed", ran.stdout)[1]))
