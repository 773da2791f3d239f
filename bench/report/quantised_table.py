"""docs/performance.md's table of a model in several types of GGUF file, from bench/peers/quantised.py's results."""

import json
from pathlib import Path

from bench.report.kernel_tables import EMPTY

HEAD = ("type", "MB", "weights by format", "llama.cpp", "with its DFlash", "ours", "with the drafter",
        "against llama.cpp's best")


def quantised_block(folder: Path) -> str:
    lines = []
    for file in sorted(folder.glob("*/quantised.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        h = result["header"]
        lines += [f"{h['model']}, {h['cpu']}, {h['threads']} threads, {h['isa']}, tokens/s at one request, "
                  f"{h['limit']} prompts of each of {h['tasks']} tasks, at most {h['max_tokens']} tokens, "
                  f"{h['rounds']} rounds in turn, llama.cpp of {result['rows'][0]['llama.cpp of']}: "
                  f"`{h['command']}`.", "",
                  f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *map(row, result["rows"]), ""]
    return "\n".join(lines or [EMPTY]).rstrip()


def row(r: dict) -> str:
    formats = ", ".join(f"{count} {name}" for name, count in sorted(r["formats"].items(), key=lambda item: -item[1]))
    best = max(r["llama"], r["llama_dflash"])
    cells = [r["type"], f"{r['bytes'] / 1e6:.0f}", formats, f"{r['llama']:.0f}", f"{r['llama_dflash']:.0f}",
             f"{r['ours']:.0f}", f"{r['ours_dflash']:.0f}", f"{r['ours'] / best:.2f}, {r['ours_dflash'] / best:.2f}"]
    return f"| {' | '.join(cells)} |"
