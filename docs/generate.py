"""Writes what is made from data: results from bench/results, docs/ops.md from the ops' docstrings.

`make docs` runs it; tests/test_docs.py fails when what it would write is not what is there.
"""

import inspect
import json
from pathlib import Path

import dflash_kernels

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# Acceptance lengths of MiniMax-M2.7's DFlash drafter, block 8, greedy, as its model card has them.
CARD = {"math500": 3.561, "gsm8k": 3.481, "humaneval": 3.610, "mt_bench": 3.550}
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
        what, limit = (f"CUDA {h['cuda']}, triton {h['triton']}", "copy") if "cuda" in h else \
            (f"{h['threads']} threads, {h['isa']}", "read")
        lines += [f"{h['device']}, {what}, torch {h['torch']}, bfloat16. The limit is the {limit} bandwidth, measured "
                  "between the calls of the same run.", "",
                  "| op | case | µs, median | GB/s | of the limit | speed against |", "|---|---|---|---|---|---|"]
        for row in rows:
            # A step is compared with the plain step that it contains, an op with another's way of doing it.
            peers = ", ".join(f"takes {row['us'] / us:.2f} plain steps" if name == "plain step" else
                              f"{us / row['us']:.2f} x {name}" for name, us in row["peers"].items())
            lines.append(f"| `{row['op']}` | {row['case']} | {row['us']:.0f} | {row['gbps']:.1f} | "
                         f"{row['pct_of_limit']:.0f} % | {peers} |")
        without = dict.fromkeys(why for row in rows for why in row.get("without", {}).values())
        lines += ["", "Without a time: " + "; ".join(without) + ".", ""] if without else [""]
    return lines


def machine(r: dict) -> str:
    return f"{r['cpu']}, {r['threads']} threads, {r['isa']}"


def decode_table(results: list[dict]) -> list[str]:
    """A row for each task of each result, beside the acceptance length on the card of MiniMax-M2.7's drafter."""
    lines = []
    for r in results:
        drafter = "random weights" if r["draft"] == "random" else r["draft"]
        lines += [f"{r['model']} with {drafter}, {r['dtype']}, block {r['block_size']}, greedy, at most "
                  f"{r['max_new_tokens']} new tokens, {r['concurrency']} at once, "
                  f"{f'the first {limit}' if (limit := r['limit']) else 'all'} prompts of each file. {machine(r)}.", "",
                  "| task | prompts | acceptance length | MiniMax-M2.7's card | tokens/s | plain tokens/s | ratio | "
                  "same text |", "|---|---|---|---|---|---|---|---|"]
        for task, t in [*r["tasks"].items(), ("all", r)]:
            same = "yes" if t["identical_to_plain"] else f"{t['different_requests']} differ"
            card = f"{CARD[task]:.3f}" if task in CARD else ""
            lines.append(f"| {task} | {t['requests']} | {t['acceptance_length']:.2f} | {card} | "
                         f"{t['tokens_per_s']:.1f} | {t['plain_tokens_per_s']:.1f} | {t['speedup']:.2f} | {same} |")
        lines.append("")
    return lines


def position_table(r: dict) -> list[str]:
    """How often the draft at a position of the block was accepted, given that all before it were."""
    width = r["block_size"]
    lines = ["| task | " + " | ".join(map(str, range(1, width))) + " |", "|---" * width + "|"]
    for task, t in [*r["tasks"].items(), ("all", r)]:
        counts = t["acceptance_histogram"]
        reached = [sum(counts[k:]) for k in range(width)]  # steps that committed more than k tokens
        shares = [f"{reached[k] / reached[k - 1]:.2f}" if reached[k - 1] else "" for k in range(1, width)]
        lines.append(f"| {task} | " + " | ".join(shares) + " |")
    return lines


def results_block(folder: Path) -> str:
    lines = [*kernel_table(folder), *decode_table(decode_results(folder))]
    return "\n".join([BEGIN, *(lines or [EMPTY]), END])


def card_block(folder: Path, drafter: str) -> str:
    """The model card's figures: those of the drafter alone."""
    found = [r for r in decode_results(folder) if r["draft"] == drafter]
    lines = decode_table(found)
    if found:
        lines += ["By position in the block: how often a draft was accepted, given that all before it were "
                  f"({found[0]['concurrency']} at once).", "", *position_table(found[0])]
    return "\n".join([BEGIN, *(lines or [EMPTY]), END])


PART_NAMES = {"context_kv": "context K/V", "draft_head": "draft head and argmax", "verify": "acceptance",
              "propose": "the whole draft", "step": "the whole step"}


def engine_tables(folder: Path) -> list[str]:
    """What bench/engines/run.py found, a machine after the other."""
    lines = []
    for file in sorted(folder.rglob("engine-*.json")):
        r = json.loads(file.read_text(encoding="utf-8"))
        h, c, s = r["header"], r["compare"], r["serve"]
        versions = ", ".join(f"{name} {version}" for name, version in h["versions"].items())
        lines += [f"{versions}, {'eager' if h['eager'] else 'compiled'}. {h['cpu']}, {h['threads']} thread"
                  f"{'s' * (h['threads'] > 1)}, {h['date']}. {h['note']}".rstrip(), "", f"`{h['command']}`", "",
                  "| on the same input | calls | the same | ids or layers | the same |", "|---|---|---|---|---|"]
        lines += [f"| {name} | {calls} | {same} | {values} | {agree} |"
                  for name, (calls, same, values, agree) in sorted(c["beside"].items())]
        lines += ["", "| | with | without |", "|---|---|---|"]
        lines += [f"| {PART_NAMES[name]}, µs, median | {us['with']:.0f} | {us['without']:.0f} |"
                  for name, us in c["us"].items()]
        lines += [f"| {what} | {c[f'{key}_with']} | {c[f'{key}_without']} |" for key, what in (
            ("acceptance_length", "acceptance length"), ("tokens_per_s", "tokens/s"))]
        lines += [f"| text | {'the same' if c['same_text'] else 'differs'} | |", "",
                  "| the server | |", "|---|---|"]
        lines += [f"| {scene} | {'yes' if good else 'NO'} |" for scene, good in s["scenes"].items()]
        lines += [f"| acceptance length, from its metrics | {s['acceptance_length']:.2f} |", ""]
    return lines


def engines_block(folder: Path) -> str:
    return "\n".join([BEGIN, *(engine_tables(folder) or ["No results yet: `make engine-vllm` fills this in."]), END])


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


def pages() -> dict[Path, str]:
    """Everything that is made, as it should be."""
    results = ROOT / "bench" / "results"
    made = {ROOT / "README.md": results_block(results), ROOT / "docs" / "engines.md": engines_block(results)}
    for card in (ROOT / "python" / "dflash_decode" / "drafters").glob("*/README.md"):
        made[card] = card_block(results, card.parent.name)
    return {page: with_results(page.read_text(encoding="utf-8"), block) for page, block in made.items()} | {
        ROOT / "docs" / "ops.md": ops_page()}


def main() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
