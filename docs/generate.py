"""Writes what is made from data: tables and plots from bench/results, docs/ops.md from the ops' docstrings.

`make docs` runs it; tests/test_docs.py fails when what it would write is not what is there.
"""

import inspect
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import draw
import peer_tables
import step_tables

import dflash_kernels
from dflash_decode.protocol import CARD_ACCEPTANCE, NOT_REPORTED, TASKS

ROOT = Path(__file__).resolve().parents[1]
PLOTS = ROOT / "docs" / "plots"
CARD = CARD_ACCEPTANCE[1]
EMPTY = "No results yet: `make bench` measures and fills this in."


def decode_results(folder: Path, kind: str = "decode") -> list[dict]:
    """Every result of `dflash-kernels bench decode` under the folder, in the order of the files' names. kind "decode by
    temperature": those of several temperatures."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.json"))]
    return [r for r in found if isinstance(r, dict) and r.get("kind") == kind]


def hardware(h: dict) -> tuple[str, str]:
    """What a header says of the machine, and which bandwidth was its limit."""
    if "cuda" in h:
        return f"CUDA {h['cuda']}, triton {h['triton']}", "copy"
    return f"{h['threads']} threads, {h['isa']}", "read"


def kernel_table(folder: Path) -> list[str]:
    """The headline rows of bench/run.py's results, one table a machine."""
    lines, files = [], sorted(folder.rglob("*.json"))
    for machine in sorted({f.parent for f in files}):
        results = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.parent == machine]
        headed = [(r["header"], row) for r in results for row in r.get("rows", ()) if row.get("headline")]
        if not headed:
            continue
        h, rows = headed[0][0], [row for _, row in headed]
        what, limit = hardware(h)
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


def run_line(r: dict, drawn: str) -> str:
    drafter = "random weights" if r["draft"] == "random" else r["draft"]
    drafter += " in 8 bits" if r.get("draft_int8") else ""
    block = f"{'blocks of at most' if r.get('adapts') and r['concurrency'] > 1 else 'block'} {r['block_size']}"
    return (f"{r['model']} with {drafter}, {r['dtype']}, {block}, {drawn}, at most "
            f"{r['max_new_tokens']} new tokens, {r['concurrency']} at once, "
            f"{f'the first {limit}' if (limit := r['limit']) else 'all'} prompts of each file. {machine(r)}.")


def drawing(r: dict) -> str:
    """The settings that are not off, the temperature apart."""
    set_ = [f"{name.replace('_', '-')} {r[name]:g}" for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0))
            if r[name] != off]
    drafts = "the likeliest drafts" if r["sample_from"] == "greedy" else f"drawn drafts, rule {r['rule']}"
    return ", ".join([*set_, drafts, f"seed {r['seed']}"])


def temperature_table(results: list[dict]) -> list[str]:
    """A row for each temperature of each result, all its tasks together."""
    lines = []
    for r in results:
        lines += [run_line(r, drawing(r)), "",
                  "| temperature | prompts | acceptance length | tokens/s | plain tokens/s | ratio | same text |",
                  "|---|---|---|---|---|---|---|"]
        for t in r["temperatures"]:
            same = "yes" if t["identical_to_plain"] else f"{t['different_requests']} differ"
            lines.append(f"| {t['temperature']:g} | {t['requests']} | {t['acceptance_length']:.2f} | "
                         f"{t['tokens_per_s']:.1f} | {t['plain_tokens_per_s']:.1f} | {t['speedup']:.2f} | {same} |")
        lines.append("")
    return lines


def decode_table(results: list[dict]) -> list[str]:
    """A row for each task of each result, beside the acceptance length on the card of MiniMax-M2.7's drafter."""
    lines = []
    for r in results:
        heat = r.get("temperature", 0)
        lines += [run_line(r, f"temperature {heat:g}, {drawing(r)}" if heat else "greedy"), "",
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
    lines = [*kernel_table(folder), *decode_table(decode_results(folder)),
             *temperature_table(decode_results(folder, "decode by temperature")), *peer_tables.summary(folder)]
    return "\n".join(lines or [EMPTY])


def card_block(folder: Path, drafter: str) -> str:
    """The model card's figures: those of the drafter alone."""
    found = [r for r in decode_results(folder) if r["draft"] == drafter]
    lines = decode_table(found) + temperature_table([r for r in decode_results(folder, "decode by temperature")
                                                     if r["draft"] == drafter])
    if found:
        lines += ["By position in the block: how often a draft was accepted, given that all before it were "
                  f"({found[0]['concurrency']} at once).", "", *position_table(found[0])]
    return "\n".join(lines or [EMPTY])


PART_NAMES = {"context_kv": "context K/V", "draft_head": "draft head and argmax", "verify": "acceptance",
              "attention": "the drafter's attention, all layers",
              "propose": "the whole draft", "step": "the whole step"}


WAYS = {"with": "the plugin", "attention": "with attention too", "without": "without it",
        "mended": "without it, each layer by its own K norm"}


def cells(us: dict[str, float], ways: list[str]) -> str:
    return " | ".join(f"{us[way]:.0f}" if way in us else "" for way in ways)


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
        lines += ["", "| step by step | steps | the same drafts | ids | the same | K/V rows | the same |",
                  "|---|---|---|---|---|---|---|"]
        lines += [f"| {' against '.join(WAYS[way] for way in pair.split(' / '))} | {n['steps']} | {n['same_steps']} | "
                  f"{n['ids']} | {n['same_ids']} | {n['rows']} | {n['same_rows']} |"
                  for pair, n in c["step_by_step"].items()]
        ways = list(c["tokens_per_s"])
        lines += ["", f"| | {' | '.join(WAYS[way] for way in ways)} |", f"|---{'|---' * len(ways)}|"]
        lines += [f"| {PART_NAMES[name]}, µs, median | {' | '.join(f'{us[way]:.0f}' for way in ways)} |"
                  for name, us in c["us"].items()]
        lines += [f"| {what} | {' | '.join(str(c[key][way]) for way in ways)} |" for key, what in (
            ("acceptance_length", "acceptance length"), ("tokens_per_s", "tokens/s"))]
        lines += [f"| context K/V of {row['tokens']} tokens alone in a loop, µs | {cells(row['us'], ways)} |"
                  for row in r["alone"]["context_kv"]]
        lines += [f"| a layer's attention alone in a loop, {row['requests']} × {row['context']} tokens of context, µs "
                  f"| {cells(row['us'], ways)} |" for row in r["alone"]["attention"]]
        lines += ["", f"The text is {'the same in all of them' if c['same_text'] else 'NOT the same'}.", "",
                  "| the server | |", "|---|---|"]
        lines += [f"| {scene} | {'yes' if good else 'NO'} |" for scene, good in s["scenes"].items()]
        left, seen = s["seen"]["left"], s["seen"]
        lines += [f"| answers at once, of tokens | {seen['answers']}, {seen['tokens_at_once']:.0f} |",
                  f"| tokens made for the client who left, of those asked for | {left['tokens_made']:.0f} of "
                  f"{left['tokens_asked']} |", f"| the refusal | {seen['refusal'][0]} |",
                  f"| acceptance length, from its metrics | {s['acceptance_length']:.2f} |", ""]
    return lines


def engines_block(folder: Path) -> str:
    return "\n".join(engine_tables(folder) or ["No results yet: `make engine-vllm` fills this in."])


def limits_block(folder: Path) -> str:
    """For each op and machine, over all cases: how much of the limit, and how much faster than each peer."""
    lines = []
    for machine in sorted(f for f in folder.iterdir() if f.is_dir()):
        results = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(machine.glob("*.json"))]
        rows = draw.measured_rows(dict(enumerate(results)))
        if not rows:
            continue
        h = next(r["header"] for r in results if "header" in r and "device" in r["header"])
        limits = sorted(row["gbps"] / row["pct_of_limit"] * 100 for row in rows)
        lines += [f"{h['device']}, {hardware(h)[0]}: the limit was {limits[0]:.1f} to {limits[-1]:.1f} GB/s.", "",
                  "| op | cases | of the limit | speed against |", "|---|---|---|---|"]
        for op in dict.fromkeys(row["op"] for row in rows):
            of = [row for row in rows if row["op"] == op]
            ratios = {peer: [row["peers"][peer] / row["us"] for row in of if peer in row["peers"]]
                      for peer in dict.fromkeys(p for row in of for p in row["peers"])}
            against = ", ".join(f"{span([1 / r for r in values], 2)} {peer}s" if peer == "plain step" else
                                f"{span(values, 2)} x {peer}" for peer, values in ratios.items())
            lines.append(f"| `{op}` | {len(of)} | {span([row['pct_of_limit'] for row in of], 0)} % | {against} |")
        lines.append("")
    return "\n".join(lines or [EMPTY])


def span(values: list[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def protocol_block(folder: Path) -> str:
    """The card's two tables, from `dflash-kernels bench protocol`."""
    lines = []
    for file in sorted(folder.rglob("*.json")):
        r = json.loads(file.read_text(encoding="utf-8"))
        if r.get("kind") != "protocol":
            continue
        who = r.get("base_url") or f"{r['model']} with {Path(r['draft']).name}, block {r['block_size']}, {machine(r)}"
        lines += [f"{who}, greedy, at most {r['max_new_tokens']} new tokens.", ""]
        for title, key, form in (("tokens/s", "tokens_per_s", ".1f"),
                                 ("acceptance length", "acceptance_length", ".3f")):
            lines += [f"| {title}, at once | " + " | ".join(TASKS.values()) + " |", "|---" * (len(TASKS) + 1) + "|"]
            for concurrency in dict.fromkeys(row["concurrency"] for row in r["rows"]):
                found = {row["task"]: row[key] for row in r["rows"] if row["concurrency"] == concurrency}
                cells = [NOT_REPORTED if found.get(t, 0) is None else format(found[t], form) if t in found else ""
                         for t in TASKS]
                lines.append(f"| {concurrency} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines or ["No results yet: `dflash-kernels bench protocol --json` writes them."])


def plots_block(folder: Path) -> str:
    lines = [f"![{plot.caption}](plots/{name})\n\n{plot.caption}\n" for name, plot in draw.plots(folder).items()]
    return "\n".join(lines or [EMPTY])


def with_block(page: str, name: str, block: str) -> str:
    """The page with what stands between the markers of that name replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"


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
    made = {ROOT / "README.md": {"results": results_block(results)},
            ROOT / "docs" / "engines.md": {"results": engines_block(results)}, ROOT / "docs" / "performance.md": {
        "limits": limits_block(results), "peers": peer_tables.peers_block(results), "protocol": protocol_block(results),
        "model": "\n".join(step_tables.tables(results)), "plots": plots_block(results)}}
    for card in (ROOT / "python" / "dflash_decode" / "drafters").glob("*/README.md"):
        made[card] = {"results": card_block(results, card.parent.name)}
    found = {ROOT / "docs" / "ops.md": ops_page()}
    for page, blocks in made.items():
        text = page.read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = with_block(text, name, block)
        found[page] = text
    return found


def old_plots(folder: Path = PLOTS, results: Path = ROOT / "bench" / "results") -> list[str]:
    """Pictures that are missing, drawn from other data, or of nothing that is there."""
    wanted = draw.plots(results)
    there = {file.name: draw.stamp_of(file) for file in folder.glob("*.png")}
    return sorted(name for name in {*wanted, *there} if name not in wanted or there.get(name) != wanted[name].stamp)


def main() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    wanted = draw.plots(ROOT / "bench" / "results")
    for name in old_plots():
        if name in wanted:
            draw.write(wanted[name], PLOTS / name)
        else:
            (PLOTS / name).unlink()


if __name__ == "__main__":
    main()
