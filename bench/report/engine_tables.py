"""Tables of vLLM with and without the plugin, from the results of bench/engines."""

import json
from pathlib import Path

PART_NAMES = {"context_kv": "context K/V", "draft_head": "draft head and argmax", "verify": "acceptance",
              "attention": "drafter attention, all layers",
              "propose": "draft", "step": "step"}


WAYS = {"with": "plugin", "attention": "plugin with attention", "without": "engine alone",
        "mended": "engine alone, per-layer K norms"}


def cells(us: dict[str, float], ways: list[str]) -> str:
    return " | ".join(f"{us[way]:.0f}" if way in us else "" for way in ways)


def engine_tables(folder: Path) -> list[str]:
    """The results of bench/engines, one machine after another."""
    lines = []
    for file in sorted(folder.rglob("engine-*.json")):
        r = json.loads(file.read_text(encoding="utf-8"))
        h, c, s = r["header"], r["compare"], r["serve"]
        versions = ", ".join(f"{name} {version}" for name, version in h["versions"].items())
        lines += [f"{versions}, {'eager' if h['eager'] else 'compiled'}. {h['cpu']}, {h['threads']} thread"
                  f"{'s' * (h['threads'] > 1)}, {h['date']}. {h['note']}".rstrip(), "", f"`{h['command']}`", "",
                  "| on identical input | calls | identical | ids or layers | identical |", "|---|---|---|---|---|"]
        lines += [f"| {name} | {calls} | {same} | {values} | {agree} |"
                  for name, (calls, same, values, agree) in sorted(c["beside"].items())]
        lines += ["", "| step by step | steps | identical drafts | ids | identical | K/V rows | identical |",
                  "|---|---|---|---|---|---|---|"]
        lines += [f"| {' vs '.join(WAYS[way] for way in pair.split(' / '))} | {n['steps']} | {n['same_steps']} | "
                  f"{n['ids']} | {n['same_ids']} | {n['rows']} | {n['same_rows']} |"
                  for pair, n in c["step_by_step"].items()]
        ways = list(c["tokens_per_s"])
        lines += ["", f"| | {' | '.join(WAYS[way] for way in ways)} |", f"|---{'|---' * len(ways)}|"]
        lines += [f"| {PART_NAMES[name]}, µs, median | {' | '.join(f'{us[way]:.0f}' for way in ways)} |"
                  for name, us in c["us"].items()]
        lines += [f"| {what} | {' | '.join(str(c[key][way]) for way in ways)} |" for key, what in (
            ("acceptance_length", "acceptance length"), ("tokens_per_s", "tokens/s"))]
        lines += [f"| context K/V alone in a loop, {row['tokens']} tokens, µs | {cells(row['us'], ways)} |"
                  for row in r["alone"]["context_kv"]]
        lines += [f"| attention of one layer alone in a loop, {row['requests']} × {row['context']} context tokens, µs "
                  f"| {cells(row['us'], ways)} |" for row in r["alone"]["attention"]]
        lines += ["", f"The output is {'identical in all of them' if c['same_text'] else 'NOT identical'}.", "",
                  "| the server | |", "|---|---|"]
        lines += [f"| {scene} | {'yes' if good else 'NO'} |" for scene, good in s["scenes"].items()]
        left, seen = s["seen"]["left"], s["seen"]
        lines += [f"| concurrent answers, and their tokens | {seen['answers']}, {seen['concurrent_tokens']:.0f} |",
                  f"| tokens generated for the client who left, of those requested | {left['tokens_made']:.0f} of "
                  f"{left['tokens_asked']} |", f"| status of the refusal | {seen['refusal'][0]} |",
                  f"| acceptance length, from the server's metrics | {s['acceptance_length']:.2f} |", ""]
    return lines


def engines_block(folder: Path) -> str:
    return "\n".join(engine_tables(folder) or ["No results yet: `make engine-vllm` fills this in."])
