"""Tables of the step model: its error against our measurements and the model cards, and predictions."""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.model.step import GEOMETRIES, MACHINES, Geometry, Layers, fits, step
from dflash_bench.protocol import CARD_ACCEPTANCE, CARD_THROUGHPUT

TILE_ROWS = 16  # the CPU products are measured up to here; each row more costs what the last eight of them did
DECODE_CONTEXT, CARD_CONTEXT = 256, 2000
# Published measurements and sources: geometry, machine, devices, concurrency, tokens/s, acceptance length, context.
ELSEWHERE = [("minimax-m2.7", "B200", 4, c, CARD_THROUGHPUT[c]["math500"], CARD_ACCEPTANCE[c]["math500"], CARD_CONTEXT,
              "the model card, Math500") for c in (1, 32)]
ELSEWHERE += [("qwen3-8b", "B200", 1, c, rate, length, 500, "sgl-project/sglang#23000, GSM8K")
              for c, rate, length in ((1, 1161.9, 6.35), (32, 15326.8, 6.48))]


@dataclass(frozen=True)
class Parts:
    """A CPU, described by its op benchmarks.

    limit: read bandwidth, GB/s. linear: share of the limit by rows, for each size of a weight in bytes. row_s: seconds
    that one weight costs for each further row. attention: GB/s over K and V by block length."""

    limit: float
    linear: dict[int, dict[int, float]]
    row_s: float
    attention: dict[int, float]

    def product(self, weights: float, rows: int, element: int = 2) -> float:
        """Microseconds of bfloat16 rows' products with weights of `element` bytes."""
        shares = self.linear[element]
        measured = [n for n in sorted(shares) if n <= min(rows, TILE_ROWS)]
        read = element * weights / (self.limit * 1e9 * shares[measured[-1]])
        return 1e6 * (read + max(0, rows - TILE_ROWS) * weights * self.row_s)

    def layers(self, layers: Layers, batch: int, block: int, context: int, element: int = 2) -> float:
        """Microseconds of a pass: products and the context's K and V."""
        nearest = min(self.attention, key=lambda q: abs(q - block))
        reads = batch * context * layers.kv_bytes() / (self.attention[nearest] * 1e3)
        return self.product(layers.weights(batch * block), batch * block, element) + reads

    def target(self, g: Geometry, batch: int, block: int, context: int) -> float:
        return self.layers(g.target, batch, block, context) + self.product(g.head, batch * block)

    def draft(self, g: Geometry, batch: int, block: int, context: int, element: int) -> float:
        streamed = g.draft_head + g.features + g.draft.layers * g.draft.kv_weights
        return self.layers(g.draft, batch, block, context, element) + self.product(streamed, batch * block, element)


def load(folder: Path, name: str) -> dict | None:
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def parts(folder: Path, geometry: str = "smollm2") -> Parts | None:
    """None where the folder lacks a measurement that this needs."""
    linear, attention = (load(folder, name) for name in ("linear", "attention"))
    shares, head, rates = {1: {}, 2: {}}, {}, {}
    for row in (linear or {"rows": []})["rows"]:
        match = re.fullmatch(rf"{geometry} (\w+) (\d+)x(\d+)( in 8 bits)?, (\d+) rows", row["case"])
        if match and row["op"] == "linear":
            rows, element = int(match[5]), 1 if match[4] else 2
            shares[element].setdefault(rows, []).append(row["pct_of_limit"] / 100)
            if match[1] == "head" and element == 2:
                head[rows] = row["us"] / 1e6 / (int(match[2]) * int(match[3]))
    for row in (attention or {"rows": []})["rows"]:
        match = re.fullmatch(rf"{geometry} context 512, Q (\d+)", row["case"])
        if match:
            rates[int(match[1])] = row["gbps"]
    if any(not {1, 8, TILE_ROWS} <= s.keys() for s in (*shares.values(), head)) or not {1, 8} <= rates.keys():
        return None
    limit = statistics.median(r["gbps"] / r["pct_of_limit"] * 100 for r in linear["rows"])
    medians = {element: {n: statistics.median(s) for n, s in by_rows.items()} for element, by_rows in shares.items()}
    return Parts(limit, medians, max(head[TILE_ROWS] - head[8], 0.0) / (TILE_ROWS - 8), rates)


def checks(folder: Path) -> list[tuple[str, float, float, str]]:
    """(what, measured, model, unit) for each measurement of a whole step or of decoding."""
    p, g = parts(folder), GEOMETRIES["smollm2"]
    if p is None:
        return []
    found = []
    for row in (load(folder, "step") or {"rows": []})["rows"]:
        context = re.search(r"context (\d+)", row["case"])
        if row["op"] in ("baseline step", "verify pass", "DFlash step") and context:
            block, context = 1 if row["op"] == "baseline step" else g.block, int(context[1])
            model = p.target(g, 1, block, context)
            if row["op"] == "DFlash step":
                model += p.draft(g, 1, block, context, 1 if "8 bits" in row["case"] else 2)
            found.append((f"{row['op']}, context {context}", row["us"], model, "µs"))
    for concurrency in (1, 8):
        r = load(folder, f"decode-c{concurrency}")
        if r and (r["model"], r["block_size"]) == (g.name, g.block):
            block = round(r.get("verified_rows", g.block))
            if r.get("adapts") and "verified_rows" not in r:  # chosen by the number of requests alone
                block = max(1, min(g.block, 32 // concurrency))
            baseline = p.target(g, concurrency, 1, DECODE_CONTEXT)
            ours = p.target(g, concurrency, block, DECODE_CONTEXT) + p.draft(
                g, concurrency, block, DECODE_CONTEXT, 1 if r.get("drafter_int8") else 2)
            where = f"concurrency {concurrency}"
            found += [
                (f"baseline decoding, {where}", r["baseline_tokens_per_s"], concurrency / baseline * 1e6, "tokens/s"),
                (
                    f"DFlash decoding, {where}",
                    r["tokens_per_s"],
                    concurrency * r["acceptance_length"] / ours * 1e6,
                    "tokens/s",
                ),
            ]
    return found


def check_table(results: Path) -> list[str]:
    lines = []
    for folder in sorted(f for f in results.iterdir() if f.is_dir()):
        if found := checks(folder):
            lines += [f"Model of the op benchmarks in `bench/results/{folder.name}`, compared with measured steps and "
                      "decoding:", "", "| case | measured | model | error |", "|---|---|---|---|"]
            lines += [f"| {what} | {measured:.{digits}f} {unit} | {model:.{digits}f} | {model / measured - 1:+.0%} |"
                      for what, measured, model, unit in found for digits in [0 if unit == "µs" else 1]]
            lines.append("")
    return lines


def card_table() -> list[str]:
    lines = ["| model, machine | concurrency | acceptance length | measured tokens/s | source | roofline | expected | "
             "measured / expected |", "|---|---|---|---|---|---|---|---|"]
    for name, machine, tp, batch, rate, length, context, source in ELSEWHERE:
        ideal, expected = (step(GEOMETRIES[name], m, batch, context, tp=tp).tokens_per_s(batch, length)
                           for m in (MACHINES[machine].ideal(), MACHINES[machine]))
        lines.append(f"| {name}, {tp} x {machine} | {batch} | {length} | {rate:.0f} | {source} | {ideal:.0f} | "
                     f"{expected:.0f} | {rate / expected:.0%} |")
    return lines


def prediction_table(name: str, length: float, context: int, devices: tuple[int, ...]) -> list[str]:
    """Expected tokens/s with the drafter, and the speedup over baseline decoding."""
    g, batches = GEOMETRIES[name], (1, 8, 32, 128)
    lines = [f"{name}, block {g.block}, acceptance length {length}, context {context}:", "",
             "| machine | " + " | ".join(f"concurrency {b}" for b in batches) + " |", "|---" * (len(batches) + 1) + "|"]
    for machine in MACHINES.values():
        for tp in devices:
            if not fits(g, machine, tp):
                continue
            cells = []
            for batch in batches:
                drafted = step(g, machine, batch, context, tp=tp).tokens_per_s(batch, length)
                baseline = step(g, machine, batch, context, block=1, tp=tp, drafting=False).tokens_per_s(batch, 1.0)
                cells.append(f"{drafted:.0f} ({drafted / baseline:.1f} x)")
            lines.append(f"| {tp} x {machine.name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def tables(results: Path) -> list[str]:
    """For docs/performance.md."""
    # Whole blocks: of those that the loop cuts short, the acceptance length is not the drafter's.
    decode = [load(f, name) for name in ("decode-block-8-c1", "decode-c1") for f in sorted(results.iterdir())
              if (f / f"{name}.json").is_file()]
    lines = [*check_table(results), "Compared with published measurements on GPUs:", "", *card_table(), "",
             "Expected tokens/s, with the speedup over baseline decoding on the same machine in brackets:", "",
             *prediction_table("minimax-m2.7", CARD_ACCEPTANCE[1]["math500"], CARD_CONTEXT, (1, 2, 4, 8)),
             *prediction_table("qwen3-8b", 6.35, 500, (1, 2, 4))]
    if decode:
        lines += prediction_table("smollm2", round(decode[0]["acceptance_length"], 2), DECODE_CONTEXT, (1,))
    return lines
