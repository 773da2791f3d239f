"""docs/performance.md's table of perplexity by how weights are kept, from the results of bench/perplexity.py."""

import json
from pathlib import Path

from bench.report.kernel_tables import EMPTY


def perplexity_block(folder: Path) -> str:
    lines = []
    for file in sorted(folder.glob("*/perplexity.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        h, first = result["header"], result["kinds"][0]["weights"]
        lines += [f"{h['device']}, {h['isa']}, {result['model']}, {result['passages']} passages of {result['length']} "
                  f"tokens: `{result['command']}`.", "",
                  f"| weights | perplexity | standard error | against {first} |", "|---|---|---|---|",
                  *(f"| {r['weights']} | {r['perplexity']:.3f} | {r['error']:.3f} | {r['percent']:+.2f} % |"
                    for r in result["kinds"]), ""]
    return "\n".join(lines or [EMPTY])
