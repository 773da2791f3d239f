"""Plots of bench/results for docs/performance.md, on white, with tones and shapes that survive greyscale printing.

Each picture carries a hash of its data, so that a test detects an outdated one under any version of matplotlib.
"""

import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.report import peer_tables
from bench.report.peer_tables import is_timed

KEYWORD = "Data"  # of the PNG's text chunk
# Their greys differ; lines also differ by dash and marker, parts of a bar by hatching.
TONES = ("#14213d", "#e9b44c", "#7a3b9d", "#f6e7c1", "#d1603d")
LINES = TONES[0], TONES[2], TONES[4], TONES[1]
DASHES, MARKERS, HATCHES = ("-", "--", "-.", ":"), "osD^v", ("", "//", "..", "xx", "--")


@dataclass(frozen=True)
class Plot:
    """draw(figure, data) fills a figure of `size` inches. The caption stands under the picture."""

    data: dict
    draw: Callable
    size: tuple[float, float]
    caption: str

    @property
    def stamp(self) -> str:
        return hashlib.sha256(json.dumps([self.data, self.caption], sort_keys=True).encode()).hexdigest()


def plots(results: Path) -> dict[str, Plot]:
    """The plots that have results, by file name."""
    found = {}
    for folder in sorted(f for f in results.iterdir() if f.is_dir()):
        files = {f.stem: json.loads(f.read_text(encoding="utf-8"))
                 for f in sorted(folder.glob("*.json"), key=lambda f: f.stem)}
        for name, make in (("bandwidth", bandwidth), ("peers", peers), ("acceptance", acceptance), ("step", steps),
                           ("overview", overview)):
            if plot := make(files):
                found[f"{name}-{folder.name}.png"] = plot
    return found


def stamp_of(file: Path) -> str | None:
    """The hash in a picture; None if it has none or is no PNG."""
    data = file.read_bytes()
    at = 8
    while data[:4] == b"\x89PNG" and at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + length]
        if kind == b"tEXt" and body.startswith(KEYWORD.encode() + b"\0"):
            return body[len(KEYWORD) + 1:].decode("latin-1")
        at += length + 12
    return None


def write(plot: Plot, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 9,
             "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
             "axes.axisbelow": True, "legend.frameon": False}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=plot.size, layout="constrained")
        plot.draw(figure, plot.data)
        figure.savefig(file, dpi=120, metadata={KEYWORD: plot.stamp})
        pyplot.close(figure)


# ---- README's picture: a step, and what it gives --------------------------------------------------------------------

STEP = (("Draft", ("prepare_block", "add_rms_norm", "linear", "qk_norm_rope", "block_attention", "silu_and_mul",
                   "lm_head_argmax"), "one pass fills a block: anchor, then masks"),
        ("Target", ("the same layer ops, causal",), "one pass over the whole block"),
        ("Verify", ("verify_greedy",), "keep drafts up to the first difference"),
        ("Commit", ("write_context_kv",), "target's hidden states into the drafter's pages"))
DRAFT_LAYERS = slice(1, 6)  # of the draft's ops: once for each layer


def overview(files: dict) -> Plot | None:
    """One request: our two modes, and each peer's best."""
    for f in files.values():
        header = f.get("header")
        if not (isinstance(header, dict) and header.get("kind") == "peers" and is_timed(header)):
            continue
        best: dict[tuple, float] = {}
        for r in (r for r in peer_tables.whole(f["rows"]) if r["concurrency"] == 1):
            best[r["peer"], r["mode"]] = max(best.get((r["peer"], r["mode"]), 0.0), round(r["tokens_per_s"], 1))
        if (peer_tables.OURS, peer_tables.DFLASH) in best:
            names = peer_tables.NAMES | {peer_tables.OURS: "dflash_kernels", "ours8": "dflash_kernels, 8 bits",
                                         "oursfile": "dflash_kernels, 4 bits"}
            bars = [[names.get(peer, peer), mode, rate]
                    for (peer, mode), rate in best.items()]
            where = f"{header['model']}, greedy, one request; {header['cpu']}, {header['threads']} threads"
            return Plot({"step": STEP, "bars": bars, "where": where}, draw_overview, (10.0, 4.2),
                        f"Left: a DFlash step and its ops. Right: tokens a second, {where}.")
    return None


def draw_overview(figure, data) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.15])
    draw_step(left, data["step"])
    rows = data["bars"]
    for y, (name, mode, rate) in enumerate(rows):
        ours, drafted = name.startswith("dflash_kernels"), mode == peer_tables.DFLASH
        right.barh(y, rate, color=TONES[0] if ours else TONES[1], edgecolor="black",
                   hatch="" if drafted else "//", alpha=0.75 if ours and not drafted else 1.0)
        right.text(rate, y, f" {rate:.0f}", va="center")
    right.set(yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5), xlabel="tokens/s (hatched: no speculation)",
              yticklabels=[f"{name}, {'DFlash' if mode == peer_tables.DFLASH else mode}" for name, mode, _ in rows])
    right.set_title(data["where"].replace("; ", "\n"), fontsize=8)
    right.margins(x=0.14)


def draw_step(axes, parts) -> None:
    """Parts from top to bottom, each a box with its ops, and the way back to the next step."""
    axes.set(xlim=(0, 11), ylim=(11.2, 0))
    axes.axis("off")
    top, line, arrow = 0.2, 0.5, {"arrowstyle": "-|>", "color": "black"}
    for i, (title, ops, about) in enumerate(parts):
        lines = [ops[0], *(f"   {op}" for op in ops[DRAFT_LAYERS]), ops[-1]] if len(ops) > 1 else ops
        height = 0.85 + line * len(lines)
        axes.add_patch(rounded_box(0.2, top, 9.8, height, TONES[3] if i % 2 else "white"))
        axes.text(0.45, top + 0.4, title, weight="bold", va="center")
        axes.text(2.3, top + 0.4, about, va="center", fontsize=7, style="italic")
        for k, op in enumerate(lines):
            axes.text(2.3, top + 0.95 + line * k, op, va="center", family="monospace", fontsize=7.5)
        if len(ops) > 1:
            axes.text(6.6, top + 0.95 + line * 3, "for each draft layer", va="center", fontsize=7)
        top += height
        if i + 1 < len(parts):
            axes.annotate("", (5.1, top + 0.47), (5.1, top), arrowprops=arrow)
            top += 0.45
    axes.plot([10, 10.4, 10.4], [top - 0.6, top - 0.6, 0.7], color="black", linewidth=1)
    axes.annotate("", (10, 0.7), (10.45, 0.7), arrowprops=arrow)
    axes.text(10.75, top / 2, "next step", rotation=90, va="center", ha="center", fontsize=7)


def rounded_box(x, y, width, height, face):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.2", facecolor=face,
                          edgecolor="black")


# ---- achieved bandwidth ----------------------------------------------------------------------------------------------


def measured_rows(files: dict) -> list[dict]:
    return [row for f in files.values() if "header" in f for row in f.get("rows", ()) if "pct_of_limit" in row]


def bandwidth(files: dict) -> Plot | None:
    """Every case of every op, in percent of the limit measured in the same run."""
    ops: dict[str, list[float]] = {}
    for row in measured_rows(files):
        ops.setdefault(row["op"], []).append(round(row["pct_of_limit"], 1))
    caption = "Achieved bandwidth in percent of the limit measured in the same run; one mark per case. " \
              "prepare_block's inputs stay in the caches."
    return Plot({"ops": ops}, draw_bandwidth, (7.5, 1.1 + 0.32 * len(ops)), caption) if ops else None


def draw_bandwidth(figure, data) -> None:
    axes, names = figure.subplots(), list(data["ops"])
    for y, name in enumerate(names):
        values = data["ops"][name]
        axes.plot([min(values), max(values)], [y, y], color="#999999", linewidth=1)
        axes.plot(values, [y] * len(values), "o", color=TONES[0], markersize=5, fillstyle="none")
    axes.axvline(100, color=TONES[4], linestyle="--", label="the limit")
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="% of the limit", ylim=(len(names) - 0.5, -0.5))
    axes.set_xlim(0, max(105, *(max(v) + 5 for v in data["ops"].values())))
    axes.legend(loc="lower left")


# ---- peers -----------------------------------------------------------------------------------------------------------


def peers(files: dict) -> Plot | None:
    """Tokens/s of each peer, over all tasks."""
    rows = []
    for f in files.values():
        if isinstance(f.get("header"), dict) and f["header"].get("kind") == "peers" and \
                is_timed(f["header"]):
            on = f" on {peer_tables.isa_of(f['header'])}"
            rows += [[f"{peer_tables.named(r['peer'])}{on * (r['peer'] in peer_tables.OUR_LOOP)}, {r['mode']}, "
                      f"{r['threads']} thr., concurrency {r['concurrency']}",
                      r["tokens_per_s"], r["slowest"], r["fastest"]] for r in peer_tables.whole(f["rows"])]
    return Plot({"rows": rows}, draw_peers, (7.5, 1.0 + 0.3 * len(rows)),
                "Tokens/s of each peer on the same prompts, greedy: the median round, with the range from the slowest "
                "to the fastest.") if rows else None


def draw_peers(figure, data) -> None:
    """One axis per concurrency, because their rates do not compare."""
    groups: dict[str, list] = {}
    for row in data["rows"]:
        groups.setdefault(row[0].rsplit(", ", 1)[1], []).append(row)
    grid = figure.subplots(len(groups), squeeze=False, height_ratios=[len(rows) for rows in groups.values()])[:, 0]
    for axes, (concurrency, rows) in zip(grid, groups.items(), strict=True):
        for y, (name, rate, low, high) in enumerate(rows):
            ours = name.startswith("ours")
            axes.barh(y, rate, color=TONES[0] if ours else TONES[1], edgecolor="black", hatch="" if ours else "//",
                      xerr=[[rate - low], [high - rate]], error_kw={"ecolor": "#777777", "capsize": 3})
            axes.text(high, y, f"  {rate:.0f}", va="center")
        axes.set(yticks=range(len(rows)), yticklabels=[name.rsplit(", ", 1)[0] for name, *_ in rows],
                 xlabel=f"tokens/s, {concurrency}", ylim=(len(rows) - 0.5, -0.5))
        axes.margins(x=0.12)


# ---- acceptance ------------------------------------------------------------------------------------------------------


def reached(counts: list[int]) -> list[float]:
    """The acceptance rate at each position, over the steps that accepted all earlier drafts."""
    left = [sum(counts[k:]) for k in range(len(counts))]
    return [round(left[k] / left[k - 1], 4) for k in range(1, len(counts)) if left[k - 1]]


def acceptance(files: dict) -> Plot | None:
    found = next((f for f in files.values() if f.get("kind") == "decode" and f["drafter"] != "random"), None)
    if found is None:
        return None
    tasks = {task: reached(t["acceptance_histogram"]) for task, t in found["tasks"].items()}
    return Plot({"tasks": tasks}, draw_acceptance, (6.5, 3.2),
                f"Acceptance rate by position, given that all earlier drafts were accepted; {found['model']} with "
                f"{found['drafter']}.")


def draw_acceptance(figure, data) -> None:
    axes = figure.subplots()
    for i, (task, shares) in enumerate(data["tasks"].items()):
        axes.plot(range(1, len(shares) + 1), shares, color=LINES[i % 4], linestyle=DASHES[i % 4],
                  marker=MARKERS[i % 5], label=task)
    axes.set(xlabel="position in the block", ylabel="acceptance rate", ylim=(0, 1))
    axes.legend(ncols=4, loc="upper center")


# ---- step time -------------------------------------------------------------------------------------------------------

STAGES = ("draft layers", "draft head", "draft context")
WHOLE = ("baseline step", "verify pass", "DFlash step")
DECODER_PARTS = (("target", "verify_ms"), ("draft", "draft_ms"), ("rest", "rest_ms"))


def place(case: str) -> str:
    """Batch and context of a case, as both step benchmarks write them."""
    batch, context = re.search(r"(\d+) x block", case), re.search(r"context (\d+)", case)
    return f"{case.split()[0].rstrip(',')}, batch {batch[1] if batch else 1}, context {context[1] if context else '?'}"


def steps(files: dict) -> Plot | None:
    """Target and draft part of whole steps, and the draft by stage, for every measured batch and context; then the
    steps of decoders that report their parts."""
    times: dict[str, dict[str, float]] = {}
    for row in measured_rows(files):
        if row["op"] in WHOLE or row["op"] in STAGES:
            times.setdefault(place(row["case"]), {})[row["op"]] = row["us"]
    bars = {}
    for where, t in times.items():
        if "baseline step" in t:
            bars[f"baseline: {where}"] = {"target": round(t["baseline step"], 1)}
        if "DFlash step" in t and "verify pass" in t:
            bars[f"DFlash: {where}"] = {"target": round(t["verify pass"], 1),
                                        "draft": round(t["DFlash step"] - t["verify pass"], 1)}
        if stages := {op: round(t[op], 1) for op in STAGES if op in t}:
            bars[f"draft: {where}"] = stages
    for f in files.values():
        for p in f.get("parts", ()) if (f.get("header") or {}).get("dtype") == "bfloat16" else ():
            if p["verify_ms"] is not None:
                bars[f"{p['peer']}, {p['mode']}, {p['threads']} thr."] = {
                    part: round(1e3 * p[name], 1) for part, name in DECODER_PARTS if p[name] is not None}
    caption = "Parts of a step. The draft part of a DFlash step is its time minus that of the verify pass."
    if any("rest" in parts for parts in bars.values()):
        caption += " Named decoders: their own passes, timed while they decode."
    return Plot({"bars": bars}, draw_steps, (7.5, 1.2 + 0.36 * len(bars)), caption) if bars else None


def draw_steps(figure, data) -> None:
    axes, names = figure.subplots(), list(data["bars"])
    kinds = sorted(dict.fromkeys(part for parts in data["bars"].values() for part in parts), key="rest".__eq__)
    for i, kind in enumerate(kinds):
        before = [sum(data["bars"][n].get(k, 0) for k in kinds[:i]) for n in names]
        values = [data["bars"][n].get(kind, 0) for n in names]
        axes.barh(range(len(names)), [v / 1e3 for v in values], left=[b / 1e3 for b in before], label=kind,
                  color=TONES[i % 5], edgecolor="white" if i == 0 else "black", hatch=HATCHES[i % 5])
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="ms", ylim=(len(names) - 0.5, -0.5))
    axes.legend(ncols=len(kinds), loc="lower right", bbox_to_anchor=(1, 1))
