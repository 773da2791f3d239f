"""Runs the ops' tests on the installed wheel, in a folder that has the tests and not the library's sources.

    python -m tools.installed [TEST...]

The interpreter must have the wheel, torch, numpy, hypothesis, pytest and pytest-timeout.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = [f"tests/kernels/test_{noun}.py" for noun in (
    "activation", "attention", "block", "context", "conv", "fp8", "linear", "norm", "quant", "rope", "sample",
    "selector", "verify")]
SAID = """
import sys
import dflash_kernels
facts = dflash_kernels.build_info()
print(*(f"{name}: {facts[name]}" for name in ("python", "torch", "compiler", "isa")), sep=", ")
there = open("/proc/cpuinfo").read()
sys.exit(not facts["cpu_kernels"] or (" avx2 " in there) != ("avx2" in facts["isas"]))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tests", "tools", "bench", "setup.py", "pyproject.toml"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, Path(folder, name))
        env = os.environ | {"PYTHONPATH": folder}
        if subprocess.run([sys.executable, "-c", SAID], cwd=folder, env=env).returncode:
            sys.exit("installed: the wheel must have C++ kernels that load and know this processor; see above")
        sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-x", "-o", "pythonpath=.", "-p", "no:xdist",
                                 *(sys.argv[1:] or TESTS)], cwd=folder, env=env).returncode)


if __name__ == "__main__":
    main()
