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
                    for r in result["servers"]), ""]
    return "\n".join(lines or [EMPTY])
