"""Tables of complete decoders on the same prompts, from the results of bench/peers."""

import json
from pathlib import Path

from bench.report.commands import command_of

ALL, OURS, DFLASH = "all", "ours", "dflash"
NAMES = {"ours8": "ours, 8 bits", "oursfile": "ours, the file's 4 bits", "dflash": "dflash's own loop",
         "llama": "llama.cpp, 4 bits", "llama8": "llama.cpp, 8 bits", "vllm": "vLLM's CPU build"}
OUR_LOOP = (OURS, "ours8", "oursfile")  # on the model's weights, and on others
EMPTY = "No results yet: `make peers` measures them."


def peers_block(folder: Path) -> str:
    lines = []
    for header, rows, parts, missing in results(folder):
        timed = [*rates(rows), *step_parts(parts, rows)] if is_timed(header) else []
        lines += [*about(header), *timed, *acceptance(rows),
                  *(f"Missing: {who}: {why}" for who, why in missing.items()), ""]
    return "\n".join(lines).rstrip() or EMPTY


def is_timed(header: dict) -> bool:
    """Whether rates are reported. A rate is a median of rounds; a single round gives output and acceptance only. So
    does float32, which nobody serves and not every decoder supports."""
    return header["dtype"] == "bfloat16" and header["rounds"] > 1


def results(folder: Path) -> list[tuple[dict, list[dict], list[dict], dict]]:
    """The header, rows, step parts and missing peers of each result."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.json"))]
    return [(r["header"], r["rows"], r.get("parts", []), r["missing"]) for r in found
            if isinstance(r, dict) and isinstance(r.get("header"), dict) and r["header"].get("kind") == "peers"]


def named(peer: str) -> str:
    return NAMES.get(peer, peer)


def isa_of(header: dict) -> str:
    """The instruction set of our loop."""
    return header["versions"][OURS]["isa"]


def whole(rows: list[dict]) -> list[dict]:
    return [r for r in rows if r["task"] == ALL] or rows


def about(h: dict) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(h["versions"]).items())
    first = f"the first {h['limit']} prompts" if h["limit"] else "all prompts"
    return [
        f"{h['model']} with {h['drafter']}, {h['dtype']}, {blocks(h)}, greedy, at most "
        f"{h['max_tokens']} new tokens. Concurrency 1: {first} of each file; higher concurrency: the first prompts "
        f"of all files. {counted(h['rounds'], 'round')}. {h['cpu']}, {counted(h['threads'], 'thread')}, "
        f"{isa_of(h)}; {versions}.",
        "",
        f"`{command_of(h['command'])}`",
        "",
    ]


def blocks(h: dict) -> str:
    size = h["block_size"]
    return f"blocks of {size}, of which we verify what pays" if h.get("adapts") else f"block {size}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def versions_of(found: dict[str, dict[str, str]]) -> dict[str, str]:
    """Versions of the peers' packages, each once."""
    left = ("isa", "llama.cpp")
    return {name: version for peer in found.values() for name, version in peer.items() if name not in left}


def rates(rows: list[dict]) -> list[str]:
    """Rates over all tasks. A speedup is over baseline decoding at the same concurrency: our own in bfloat16, and the
    decoder's own with as many threads."""
    baseline = {(r["peer"], r["concurrency"], r["threads"]): r["tokens_per_s"] for r in whole(rows)
                if r["mode"] == "baseline"}
    lines = [
        "| decoder | mode | threads | concurrency | tokens/s, median | range of the rounds | speedup over our "
        "bfloat16 baseline | over its own | ms per step | acceptance length | output identical to our bfloat16 "
        "baseline |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in whole(rows):
        over = (baseline.get((who, r["concurrency"], r["threads"])) for who in (OURS, r["peer"]))
        of = " | ".join(f"{r['tokens_per_s'] / rate:.2f}" if rate else "" for rate in over)
        same = "" if r["same_as_our_baseline"] is None else f"{r['same_as_our_baseline']} of {r['prompts']}"
        step = "" if r["ms_per_step"] is None else f"{r['ms_per_step']:.1f}"
        lines.append(f"| {named(r['peer'])} | {r['mode']} | {r['threads']} | {r['concurrency']} | "
                     f"{r['tokens_per_s']:.1f} | {r['slowest']:.1f} to {r['fastest']:.1f} | {of} | {step} | "
                     f"{r['acceptance_length']:.2f} | {same} |")
    return [*lines, ""]


def step_parts(parts: list[dict], rows: list[dict]) -> list[str]:
    """The parts of a step, with the step time of the rounds, which run without this instrumentation."""
    if not parts:
        return []
    rounds = {(r["peer"], r["mode"], r["threads"]): r["ms_per_step"] for r in whole(rows) if r["concurrency"] == 1}
    lines = ["Parts of a step in ms: medians over the steps of each task's first prompt, decoded once more after the "
             "rounds with timers around the passes. Draft: the drafter's pass, its LM head and the context's K/V; "
             "verify: the target's pass and LM head; rest: acceptance and host work.", "",
             "| decoder | mode | threads | draft | verify | rest | step | mean step in the rounds |",
             "|---|---|---|---|---|---|---|---|"]
    for p in parts:
        times = [p[f"{name}_ms"] for name in ("draft", "verify", "rest", "step")]
        cells = " | ".join("" if ms is None else f"{ms:.1f}" for ms in
                           [*times, rounds.get((p["peer"], p["mode"], p["threads"]))])
        lines.append(f"| {named(p['peer'])} | {p['mode']} | {p['threads']} | {cells} |")
    why = dict.fromkeys((named(p["peer"]), p["whole"]) for p in parts if p["whole"])
    return [*lines, *(line for name, reason in why for line in ("", f"{name}: {reason}.")), ""]


def acceptance(rows: list[dict]) -> list[str]:
    """The acceptance length by task at concurrency 1, with the difference to ours."""
    drafted = [r for r in rows if r["mode"] == DFLASH and r["concurrency"] == 1]
    peers = list(dict.fromkeys(r["peer"] for r in drafted))
    if OURS not in peers or len(peers) < 2:
        return []
    found = {(r["peer"], r["task"]): r["acceptance_length"] for r in drafted}
    lines = ["| acceptance length | " + " | ".join(named(p) for p in peers) + " |",
             "|---" * (len(peers) + 1) + "|"]
    for task in dict.fromkeys(r["task"] for r in drafted):
        ours = found.get((OURS, task))
        cells = ["" if (length := found.get((peer, task))) is None else
                 f"{length:.2f}" + (f" ({100 * (length / ours - 1):+.1f} %)" if ours and peer != OURS else "")
                 for peer in peers]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    for r in drafted:
        same = r["same_text"] if r["task"] == ALL and r["peer"] != OURS else None
        if same and same["prompts"]:
            lines += ["", f"On the {same['prompts']} prompts with output identical to ours, the acceptance length of "
                      f"{named(r['peer'])} is {same['acceptance_length']:.3f} and ours "
                      f"{same['ours']:.3f} ({100 * (same['acceptance_length'] / same['ours'] - 1):+.1f} %)."]
    return [*lines, ""]
