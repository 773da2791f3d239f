"""docs/channels.md's table of the wheel's times over the tree's, from the results of bench/wheel.py."""

import json
import statistics
from pathlib import Path

from bench.report.kernel_tables import EMPTY

ALIKE = 1.1  # times the read bandwidth, at most, that the one process had and the other had not


def wheel_block(folder: Path) -> str:
    lines = []
    for file in sorted(folder.glob("*/wheel.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        h, ratios = result["header"], {}
        for row in result["rows"]:
            (tree, gbps), (wheel, other) = row["closest"]
            if 1 / ALIKE < gbps / other < ALIKE:
                ratios.setdefault((row["op"], row["isa"]), []).append(wheel / tree)
        lines += [f"{h['device']}, {h['threads']} threads, torch {h['torch']}, the wheel by {h['wheel']}, the tree by "
                  f"g++ {h['tree']}: `{result['command']}`.", "",
                  "| op | set | cases | wheel's time over tree's, median | least and most |", "|---|---|---|---|---|",
                  *(f"| `{op}` | {isa} | {len(of)} | {statistics.median(of):.2f} | {min(of):.2f} to {max(of):.2f} |"
                    for (op, isa), of in sorted(ratios.items())), ""]
    return "\n".join(lines or [EMPTY])
