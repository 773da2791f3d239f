"""docs/performance.md's table of servers, from the results of bench/server_times.py."""

import json
from pathlib import Path

from bench.report.kernel_tables import EMPTY


def servers_block(folder: Path) -> str:
    lines = []
    for file in sorted(folder.glob("*/server-times.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        h = result["header"]
        lines += [f"{h['device']}, {h['threads']} threads, {h['isa']}, {result['model']}: `{result['command']}`.", "",
                  "| server | concurrent clients | tokens/s | first token, median | first token, longest |",
                  "|---|---|---|---|---|",
                  *(f"| {r['server']} | {r['concurrency']} | {r['tokens_per_s']:.0f} | "
                    f"{1e3 * r['first_token_median_s']:.0f} ms | {1e3 * r['first_token_most_s']:.0f} ms |"
                    for r in result["servers"]), "", *conversations(result["conversations"]), ""]
    return "\n".join(lines or [EMPTY])


def conversations(rows: list[dict]) -> list[str]:
    """Time to the first token of some turns, the last among them."""
    shown = sorted({*(n for n in (1, 2, 4, 8, 16) if n < len(rows[0]["turns"])), len(rows[0]["turns"])})
    return [f"| server | earlier turns | {' | '.join(f'turn {n}' for n in shown)} |", "|---" * (2 + len(shown)) + "|",
            *(f"| {r['server']} | {'read again' if r['fresh'] else 'reused'} | "
              + " | ".join(turn(r["turns"][n - 1]) for n in shown) + " |" for r in rows)]


def turn(found: dict) -> str:
    return f"{1e3 * found['first_token_s']:.0f} ms of {found['prompt_tokens']} tokens"
