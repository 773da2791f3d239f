"""Thousands of damaged checkpoints: each loads and decodes, or is a CheckpointError; in bounded memory and time."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

KINDS = {"config", "weights", "index", "draft", "vocabulary", "selector", "gguf"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mutated_files_load_or_are_checkpoint_errors():
    """In a process of its own, for the limit on its memory."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python")))
    done = subprocess.run([sys.executable, "-m", "tests.support.mutations", "3000", "0"], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert set(found["outcomes"]) == {f"{kind} {how}" for kind in KINDS for how in ("loaded", "refused")}
    assert sum(found["outcomes"].values()) == 3000 and min(found["outcomes"].values()) >= 5
