"""Commands that run the benchmarks in the repository's folder bench, which is not part of the wheel."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from dflash_decode.cli.options import Debug, Device, Threads, UsageError, Where, short

from .options import check_written

ROOT = Path(__file__).resolve().parents[2]


def ops(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks to run; by default all.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls per case.")] = 40,
    device: Where = Device.cpu,
    threads: Threads = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Use tiny shapes, to check that the benchmarks run.")] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Benchmark each op and whole steps. Each case is compared with its reference, then timed against its peers and
    the memory bandwidth limit.

    `make bench` does the same and keeps the results in the repository."""
    check_written({"--json": json_out})
    known = sorted(file.stem for file in (ROOT / "bench" / "ops").glob("[a-z]*.py") if file.stem != "measure")
    if known and (unknown := sorted(set(names or ()) - set(known))):
        raise UsageError(f"benchmarks are {', '.join(known)}; got {short(unknown[0])}")
    words = [*(names or ()), "--runs", str(runs), "--device", device.value]
    words += ["--tiny"] * tiny + (["--threads", str(threads)] if threads else [])
    start("bench.ops", words + (["--json", str(json_out)] if json_out else ["--no-write"]))


def peers(names: str, prompts: list[Path], options: dict[str, object]) -> None:
    """Runs our loop and the named peers, separated by commas, in turn. options: of the script, None if not set."""
    words = ["--only", names, "--prompts", *map(str, prompts)]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    start("bench.peers", words if options["json"] else [*words, "--no-write"])


def start(module: str, words: list[str]) -> None:
    """Runs a module of the repository's folder bench and exits with its code."""
    if not (ROOT / module.replace(".", "/") / "__main__.py").is_file():
        raise UsageError(f"this needs the source repository: {module.replace('.', '/')} is not part of the installed "
                         "package; in a clone, run `make build` and `.venv/bin/dflash-kernels`")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = subprocess.run([sys.executable, "-m", module, *words], env=os.environ | {"PYTHONPATH": path}).returncode
    if code:
        raise typer.Exit(code)
