"""docs/performance.md's table of targets with states, from the results of bench/states.py."""

import json
from pathlib import Path

from bench.report.kernel_tables import EMPTY


def states_block(folder: Path) -> str:
    lines = []
    for file in sorted(folder.glob("*/states.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        h, block = result["header"], result["block"]
        accepted = [block, block // 2, 1]
        heads = ["like", "weights", "a token of generate", "baseline step",
                 *(f"block of {block}, {n} accepted" for n in accepted)]
        lines += [f"{h['device']}, {h['threads']} threads, torch {h['torch']}, transformers {h['transformers']}: "
                  f"`{result['command']}`.", "", _line(heads), _line(["---"] * len(heads)),
                  *(_row(r, accepted) for r in result["models"]), ""]
    return "\n".join(lines or [EMPTY])


def _row(r: dict, accepted: list[int]) -> str:
    passes = [f"{r[f'block_{n}_ms'] / r['one_ms']:.1f} steps" for n in accepted]
    return _line([r["model"], f"{r['weights'] / 1e6:.0f} million",
                  *(f"{r[name]:.1f} ms" for name in ("generate_ms", "one_ms")), *passes])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
