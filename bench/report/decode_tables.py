"""Tables of decoding, from the results of `dflash-kernels bench decode` and `bench protocol`."""

import json
from collections.abc import Collection
from pathlib import Path

from dflash_bench.protocol import CARD_ACCEPTANCE, NOT_REPORTED, TASKS

CARD = CARD_ACCEPTANCE[1]
EMPTY = "No results yet: `make evaluate` measures them."


def decode_results(folder: Path, kind: str = "decode") -> list[dict]:
    """The results of `dflash-kernels bench decode` under the folder, ordered by file name.

    kind "decode by temperature": those of several temperatures."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.json"))]
    return [r for r in found if isinstance(r, dict) and r.get("kind") == kind]


def machine(r: dict) -> str:
    return f"{r['cpu']}, {r['threads']} threads, {r['isa']}"


def run_line(r: dict, drawn: str) -> str:
    drafter = "random weights" if r["drafter"] == "random" else r["drafter"]
    drafter += " in 8 bits" if r.get("drafter_int8") else ""
    chosen = r.get("adapts") and (r["concurrency"] > 1 or "verified_rows" in r)
    block = "drafts that pay" if chosen else f"block {r['block_size']}"
    if "verified_rows" in r:
        block += f", {r['verified_rows']:.2f} tokens verified a step"
    model = r["model"] + " in 8 bits" * (r.get("weights") == "int8")
    return (f"{model} with {drafter}, {r['dtype']}, {block}, {drawn}, at most "
            f"{r['max_tokens']} new tokens, concurrency {r['concurrency']}, "
            f"{f'the first {limit}' if (limit := r['limit']) else 'all'} prompts of each file. {machine(r)}.")


def drawing(r: dict) -> str:
    """The sampling settings that are not off, without the temperature."""
    set_ = [f"{name.replace('_', '-')} {r[name]:g}" for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0))
            if r[name] != off]
    drafts = "greedy drafts" if r["sample_from"] == "greedy" else f"sampled drafts, rule {r['rule']}"
    return ", ".join([*set_, drafts, f"seed {r['seed']}"])


def temperature_table(results: list[dict]) -> list[str]:
    """A row for each temperature of each result, over all its tasks."""
    lines = []
    for r in results:
        lines += [run_line(r, drawing(r)), "",
                  "| temperature | prompts | acceptance length | tokens/s | baseline tokens/s | speedup | "
                  "identical output |",
                  "|---|---|---|---|---|---|---|"]
        for t in r["temperatures"]:
            same = "yes" if t["identical_to_baseline"] else f"{t['different_requests']} differ"
            lines.append(f"| {t['temperature']:g} | {t['requests']} | {t['acceptance_length']:.2f} | "
                         f"{t['tokens_per_s']:.1f} | {t['baseline_tokens_per_s']:.1f} | {t['speedup']:.2f} | {same} |")
        lines.append("")
    return lines


def decode_table(results: list[dict]) -> list[str]:
    """A row for each task of each result, with the acceptance length from the card of MiniMax-M2.7's drafter."""
    lines = []
    for r in results:
        temp = r.get("temperature", 0)
        lines += [run_line(r, f"temperature {temp:g}, {drawing(r)}" if temp else "greedy"), "",
                  "| task | prompts | acceptance length | MiniMax-M2.7's card | tokens/s | baseline tokens/s | "
                  "speedup | identical output |", "|---|---|---|---|---|---|---|---|"]
        for task, t in [*r["tasks"].items(), ("all", r)]:
            same = "yes" if t["identical_to_baseline"] else f"{t['different_requests']} differ"
            card = f"{CARD[task]:.3f}" if task in CARD else ""
            lines.append(f"| {task} | {t['requests']} | {t['acceptance_length']:.2f} | {card} | "
                         f"{t['tokens_per_s']:.1f} | {t['baseline_tokens_per_s']:.1f} | {t['speedup']:.2f} | {same} |")
        lines.append("")
    return lines


def cell_table(results: list[dict]) -> list[str]:
    """A row for each instruction set and concurrency: the speedup of each task and of all, and what all took."""
    lines = []
    for r in results:
        tasks = list(r["cells"][0]["tasks"])
        limit = f"the first {r['limit']}" if r["limit"] else "all"
        lines += [f"{r['model']} with {r['drafter']}, {r['dtype']}, greedy, at most {r['max_tokens']} new tokens, "
                  f"{limit} prompts of each file. {r['cpu']}, {r['threads']} threads. Speedup over baseline decoding:",
                  "", f"| instruction set | concurrency | {' | '.join(tasks)} | all | tokens/s | acceptance length | "
                  "tokens verified a step | identical output |", "|---|" + "---|" * (len(tasks) + 6)]
        for c in r["cells"]:
            same = "yes" if c["identical_to_baseline"] else f"{c['different_requests']} differ"
            ratios = " | ".join(f"{t['speedup']:.2f}" for t in (*c["tasks"].values(), c))
            lines.append(f"| {c['isa']} | {c['concurrency']} | {ratios} | {c['tokens_per_s']:.1f} | "
                         f"{c['acceptance_length']:.2f} | {c['verified_rows']:.2f} | {same} |")
        lines += ["", *forecast_table(r["cells"])]
    return lines


def forecast_table(cells: list[dict]) -> list[str]:
    """What the choice of widths expected of a step, over all requests, and what the step brought and took."""
    told = [c for c in cells if "forecast" in c]
    if not told:
        return []
    lines = ["Tokens of a step over all requests, and milliseconds of its draft and verify pass, as the loop expected "
             "them when it chose widths, and as they came:", "",
             "| instruction set | concurrency | tokens expected | tokens | ms expected | ms |",
             "|---|---|---|---|---|---|"]
    for c in told:
        told_of = [*c["forecast"]["tokens_per_step"], *c["forecast"]["ms_per_step"]]
        lines.append(f"| {c['isa']} | {c['concurrency']} | {' | '.join(f'{v:.2f}' for v in told_of)} |")
    return [*lines, ""]


def position_table(r: dict) -> list[str]:
    """The acceptance rate at each block position, given that all earlier drafts were accepted."""
    width = r["block_size"]
    lines = ["| task | " + " | ".join(map(str, range(1, width))) + " |", "|---" * width + "|"]
    for task, t in [*r["tasks"].items(), ("all", r)]:
        counts = t["acceptance_histogram"]
        reached = [sum(counts[k:]) for k in range(width)]  # steps that committed more than k tokens
        shares = [f"{reached[k] / reached[k - 1]:.2f}" if reached[k - 1] else "" for k in range(1, width)]
        lines.append(f"| {task} | " + " | ".join(shares) + " |")
    return lines


def decode_block(folder: Path) -> str:
    lines = [*decode_table(decode_results(folder)),
             *cell_table(decode_results(folder, "decode by instruction set")),
             *temperature_table(decode_results(folder, "decode by temperature"))]
    return "\n".join(lines or [EMPTY])


def card_block(folder: Path, names: Collection[str]) -> str:
    """The results of one drafter, for its model card. names: of its folder, and of its package in it."""
    found = [r for r in decode_results(folder) if r["drafter"] in names]
    lines = decode_table(found) + temperature_table([r for r in decode_results(folder, "decode by temperature")
                                                     if r["drafter"] in names])
    if found:
        lines += ["Acceptance rate by position in the block, given that all earlier drafts were accepted "
                  f"(concurrency {found[0]['concurrency']}).", "", *position_table(found[0])]
    return "\n".join(lines or [EMPTY])


def protocol_block(folder: Path) -> str:
    """The two tables of the model cards, from `dflash-kernels bench protocol`."""
    lines = []
    for file in sorted(folder.rglob("*.json")):
        r = json.loads(file.read_text(encoding="utf-8"))
        if r.get("kind") != "protocol":
            continue
        who = f"{r['model']} at {r['base_url']}" if "base_url" in r else \
            f"{r['model']} with {r['drafter']}, block {r['block_size']}, {machine(r)}"
        asked = f"the first {r['limit']}" if r["limit"] else "all"
        lines += [f"{who}, greedy, at most {r['max_tokens']} new tokens, {asked} prompts of each file.", ""]
        for title, key, form in (("tokens/s", "tokens_per_s", ".1f"),
                                 ("acceptance length", "acceptance_length", ".3f")):
            lines += [f"| {title} by concurrency | " + " | ".join(TASKS.values()) + " |",
                      "|---" * (len(TASKS) + 1) + "|"]
            for concurrency in dict.fromkeys(row["concurrency"] for row in r["rows"]):
                found = {row["task"]: row[key] for row in r["rows"] if row["concurrency"] == concurrency}
                cells = [NOT_REPORTED if found.get(t, 0) is None else format(found[t], form) if t in found else ""
                         for t in TASKS]
                lines.append(f"| {concurrency} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines or ["No results yet: `dflash-kernels bench protocol --json` writes them."])
