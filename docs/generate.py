"""Writes what is made from data: README.md's results from bench/results, docs/ops.md from the ops' docstrings.

`make docs` runs it; tests/test_docs.py fails when what it would write is not what is there.
"""

import inspect
import json
from pathlib import Path

import dflash_kernels

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
EMPTY = "No results yet: `make bench` measures and fills this in."


def decode_results(folder: Path) -> list[dict]:
    """Every result of `dflash-kernels bench decode` under the folder, in the order of the files' names."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.json"))]
    return [r for r in found if isinstance(r, dict) and r.get("kind") == "decode"]


def kernel_table(folder: Path) -> list[str]:
    """The headline rows of bench/run.py's results, one table a machine."""
    lines, files = [], sorted(folder.rglob("*.json"))
    for machine in sorted({f.parent for f in files}):
        results = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.parent == machine]
        rows = [row for r in results if "rows" in r for row in r["rows"] if row.get("headline")]
        if not rows:
            continue
        h = next(r["header"] for r in results if "rows" in r)
        lines += [f"{h['device']}, {h['threads']} threads, {h['isa']}, torch {h['torch']}, bfloat16. The limit is the "
                  "read bandwidth, measured between the calls of the same run.", "",
                  "| op | case | µs, median | GB/s | of the limit | speed against |", "|---|---|---|---|---|---|"]
        for row in rows:
            # A step is compared with the plain step that it contains, an op with another's way of doing it.
            peers = ", ".join(f"takes {row['us'] / us:.2f} plain steps" if name == "plain step" else
                              f"{us / row['us']:.2f} x {name}" for name, us in row["peers"].items())
            lines.append(f"| `{row['op']}` | {row['case']} | {row['us']:.0f} | {row['gbps']:.1f} | "
                         f"{row['pct_of_limit']:.0f} % | {peers} |")
        lines.append("")
    return lines


def results_block(folder: Path) -> str:
    rows, kernels = decode_results(folder), kernel_table(folder)
    if not rows:
        return "\n".join([BEGIN, *(kernels or [EMPTY]), END])
    lines = [*kernels, "| model | drafter | block | requests at once | acceptance length | tokens/s | plain tokens/s | "
             "ratio | same text | machine |", "|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        drafter = "random weights" if r["draft"] == "random" else Path(r["draft"]).name
        same = "yes" if r["identical_to_plain"] else f"{r['different_requests']} of {r['requests']} differ"
        lines.append(f"| {r['model']}, {r['dtype']} | {drafter} | {r['block_size']} | {r['concurrency']} | "
                     f"{r['acceptance_length']:.2f} | {r['tokens_per_s']:.1f} | {r['plain_tokens_per_s']:.1f} | "
                     f"{r['speedup']:.2f} | {same} | {r['cpu']}, {r['threads']} threads, {r['isa']} |")
    return "\n".join([BEGIN, *lines, END])


def with_results(readme: str, block: str) -> str:
    before, rest = readme.split(BEGIN, 1)
    return before + block + rest.split(END, 1)[1]


def ops_page() -> str:
    parts = ["# Ops", "", "Made by `make docs` from the docstrings. B requests, Q block length, T tokens, "
             "Hq/Hkv heads, D head dim, P page size, V vocabulary, H hidden, L draft layers.", ""]
    for name in dflash_kernels.__all__:
        item = getattr(dflash_kernels, name)
        signature = "" if inspect.isclass(item) else str(inspect.signature(item)).replace("torch.Tensor", "Tensor")
        parts += [f"## {name}", "", "```text", f"{name}{signature}", "", inspect.getdoc(item), "```", ""]
    return "\n".join(parts)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_results(readme.read_text(encoding="utf-8"), results_block(ROOT / "bench" / "results")),
                      encoding="utf-8")
    (ROOT / "docs" / "ops.md").write_text(ops_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
