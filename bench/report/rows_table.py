"""docs/performance.md's tables of products by instruction set and number of rows, from the results of bench/rows.py."""

import json
from pathlib import Path

from bench.report.kernel_tables import EMPTY

SHOWN = "gate_up"
NAMES = {"bf16": "bfloat16", "int8": "8 bits"}


def rows_block(folder: Path) -> str:
    lines = []
    for file in sorted(folder.glob("*/rows.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        h, products = result["header"], result["products"]
        lines += [f"{h['device']}, {h['threads']} threads, torch {h['torch']}: `{result['command']}`.", "",
                  *shown(products), *shares(products), *heads(products)]
    return "\n".join(lines or [EMPTY])


def named(weights: str) -> str:
    return NAMES.get(weights, weights)


def shown(products: list[dict]) -> list[str]:
    """Every number of one shape."""
    of = [p for p in products if p["shape"] == SHOWN]
    return [f"`linear` {of[0]['n']}x{of[0]['k']}:", "",
            "| weights | set | rows | µs | GB/s | TFLOP/s | of the bound | relative speed |",
            "|---|---|---|---|---|---|---|---|",
            *(f"| {named(p['weights'])} | {p['isa']} | {p['rows']} | {p['us']:.1f} | {p['gbps']:.1f} "
              f"| {p['tflops']:.3f} | {p['pct_of_bound']:.0f} % | {p['torch_us'] / p['us']:.2f} x torch |"
              for p in of), ""] if of else []


def shares(products: list[dict]) -> list[str]:
    """The share of the bound of every shape."""
    of = [p for p in products if not p["shape"].startswith("draft")]
    rows = sorted({p["rows"] for p in of})
    found = {(p["op"], p["n"], p["k"], p["weights"], p["isa"], p["rows"]): p["pct_of_bound"] for p in of}
    lines = [f"| op | weights | set | {' | '.join(f'{r} row{chr(115) * (r > 1)}' for r in rows)} |",
             "|---" * (3 + len(rows)) + "|"]
    for op, n, k, weights, isa in dict.fromkeys(key[:5] for key in found):
        cells = (found.get((op, n, k, weights, isa, r)) for r in rows)
        lines.append(f"| `{op}` {n}x{k} | {named(weights)} | {isa} | "
                     + " | ".join("" if cell is None else f"{cell:.0f} %" for cell in cells) + " |")
    return ["Of the bound:", "", *lines, ""] if of else []


def heads(products: list[dict]) -> list[str]:
    """What the log-sum-exp costs beside the best token alone."""
    of = {(p["op"], p["weights"], p["isa"], p["rows"]): p for p in products if p["shape"].startswith("draft")}
    lines = []
    for (op, weights, isa, rows), p in of.items():
        if op == "lm_head_argmax" and (other := of.get(("lm_head_topk", weights, isa, rows))):
            lines.append(f"| {named(weights)} | {isa} | {rows} | {p['us']:.0f} | {other['us']:.0f} | "
                         f"{other['us'] / p['us']:.2f} |")
    return ["A head of 8192x576, its best token alone, and with the log-sum-exp:", "",
            "| weights | set | rows | `lm_head_argmax`, µs | `lm_head_topk` with K 1, µs | ratio |",
            "|---|---|---|---|---|---|", *lines, ""] if lines else []
