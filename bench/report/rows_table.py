"""docs/performance.md's tables of products by instruction set and number of rows, from the results of bench/rows.py."""

import json
from pathlib import Path

from bench.report.kernel_tables import EMPTY

SHOWN, WIDTHS = "gate_up", {16: "bfloat16", 8: "8 bits"}


def rows_block(folder: Path) -> str:
    lines = []
    for file in sorted(folder.glob("*/rows.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        h, products = result["header"], result["products"]
        lines += [f"{h['device']}, {h['threads']} threads, torch {h['torch']}: `{result['command']}`.", "",
                  *shown(products), *shares(products), *heads(products)]
    return "\n".join(lines or [EMPTY])


def shown(products: list[dict]) -> list[str]:
    """Every number of one shape."""
    of = [p for p in products if p["shape"] == SHOWN]
    return [f"`linear` {of[0]['n']}x{of[0]['k']}:", "",
            "| weights | set | rows | µs | GB/s | TFLOP/s | of the bound | relative speed |",
            "|---|---|---|---|---|---|---|---|",
            *(f"| {WIDTHS[p['bits']]} | {p['isa']} | {p['rows']} | {p['us']:.1f} | {p['gbps']:.1f} | {p['tflops']:.3f} "
              f"| {p['pct_of_bound']:.0f} % | {p['torch_us'] / p['us']:.2f} x torch |" for p in of), ""] if of else []


def shares(products: list[dict]) -> list[str]:
    """The share of the bound of every shape."""
    of = [p for p in products if not p["shape"].startswith("draft")]
    rows = sorted({p["rows"] for p in of})
    found = {(p["op"], p["n"], p["k"], p["bits"], p["isa"], p["rows"]): p["pct_of_bound"] for p in of}
    lines = [f"| op | weights | set | {' | '.join(f'{r} row{chr(115) * (r > 1)}' for r in rows)} |",
             "|---" * (3 + len(rows)) + "|"]
    for op, n, k, bits, isa in dict.fromkeys(key[:5] for key in found):
        cells = (found.get((op, n, k, bits, isa, r)) for r in rows)
        lines.append(f"| `{op}` {n}x{k} | {WIDTHS[bits]} | {isa} | "
                     + " | ".join("" if cell is None else f"{cell:.0f} %" for cell in cells) + " |")
    return ["Of the bound:", "", *lines, ""] if of else []


def heads(products: list[dict]) -> list[str]:
    """What the log-sum-exp costs beside the best token alone."""
    of = {(p["op"], p["bits"], p["isa"], p["rows"]): p for p in products if p["shape"].startswith("draft")}
    lines = []
    for (op, bits, isa, rows), p in of.items():
        if op == "lm_head_argmax" and (other := of.get(("lm_head_topk", bits, isa, rows))):
            lines.append(f"| {WIDTHS[bits]} | {isa} | {rows} | {p['us']:.0f} | {other['us']:.0f} | "
                         f"{other['us'] / p['us']:.2f} |")
    return ["A head of 8192x576, its best token alone, and with the log-sum-exp:", "",
            "| weights | set | rows | `lm_head_argmax`, µs | `lm_head_topk` with K 1, µs | ratio |",
            "|---|---|---|---|---|---|", *lines, ""] if lines else []
