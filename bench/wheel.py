"""The library of a wheel beside this tree's on the cases of bench.ops, in turn, each in a process of its own.

    python -m bench.wheel WHEEL [NAME...] [--rounds N] [--runs N] [--add] [--json OUT]

Both must be built from these sources; DFLASH_ISA names the instruction set of both. Memory can be faster for one
process than for the next, so a case's times are those of the two processes whose read bandwidth, measured between the
calls, was closest. --add counts the rounds in the file too. Writes bench/results/<device>/wheel.json.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import setup
from bench import ROOT
from bench.case import results_folder
from bench.ops.measure import NAMES
from dflash_bench.results import commit, output, write_json

LIBRARY = Path("dflash_kernels", "_C.abi3.so")


def checked(wheel: Path, folder: Path) -> None:
    """Unpacks the wheel. Its library and the tree's must have the mark of these sources."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for file in (folder / LIBRARY, ROOT / LIBRARY):
        if not file.is_file() or setup.sources_mark().encode() not in file.read_bytes():
            sys.exit(f"wheel: {file} must be built from these sources; got {'others' if file.is_file() else 'no file'}")


def measured(names: list[str], runs: int, unpacked: Path | None) -> dict:
    """What bench.ops writes, of the library in a folder or of the tree's."""
    path = [*([unpacked] if unpacked else []), ROOT, ROOT / "python"]
    with tempfile.TemporaryDirectory() as folder:  # not in the tree, whose library `-m` would find first
        file = Path(folder, "rows.json")
        subprocess.run([sys.executable, "-m", "bench.ops", *names, "--no-peers", "--runs", str(runs), "--json", file],
                       cwd=folder, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))})
        return json.loads(file.read_text(encoding="utf-8"))


def rows_of(found: list[tuple[str, dict]], before: list[dict]) -> list[dict]:
    """found: "tree" or "wheel" and the results, of every process. before: rows of earlier rounds. A row has the times
    and the read bandwidth of each process, and `closest`, two of these."""
    rows = {(row["isa"], row["op"], row["case"]): row for row in before}
    for where, result in found:
        for timed in result["rows"]:
            key = result["header"]["isa"], timed["op"], timed["case"]
            row = rows.setdefault(key, dict(zip(("isa", "op", "case"), key, strict=True)) | {"tree": [], "wheel": []})
            row[where].append([timed["us"], timed["limit_gbps"]])
    for row in rows.values():
        row["closest"] = min(itertools.product(row["tree"], row["wheel"]),
                             key=lambda two: abs(math.log(two[0][1] / two[1][1])))
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--add", action="store_true", help="count the rounds in the file too")
    parser.add_argument("--json", type=output, help="another file")
    options = parser.parse_args()
    file: Path = options.json or results_folder() / "wheel.json"
    before: dict = json.loads(file.read_text(encoding="utf-8")) if options.add else {"rows": []}
    if options.add and before["sources"] != setup.sources_mark():
        sys.exit(f"wheel: --add must be to rounds of these sources; got others in {file}")
    with tempfile.TemporaryDirectory() as folder:
        checked(options.wheel, Path(folder))
        pair = [("tree", None), ("wheel", Path(folder))]
        found = [(where, measured(options.names, options.runs, unpacked)) for number in range(options.rounds)
                 for where, unpacked in pair[::-1 if number % 2 else 1]]
    rows, headers = rows_of(found, before["rows"]), {where: result["header"] for where, result in found}
    for row in rows:
        (tree, _), (other, _) = row["closest"]
        print(f"{row['isa']:<12} {row['op']:<26} {row['case']:<40} tree {tree:9.1f} us, wheel {other:9.1f} us: "
              f"{other / tree:.2f}")
    head = {name: headers["tree"][name] for name in ("device", "threads", "torch")}
    write_json(file, {"header": head | {"commit": commit(), **{w: h["compiler"] for w, h in headers.items()}},
                      "sources": setup.sources_mark(), "command": " ".join([
                          "python -m bench.wheel dist/*.whl", *options.names, f"--runs {options.runs}"]),
                      "rows": rows})


if __name__ == "__main__":
    main()
