"""Numbers in the prose of README and docs, from bench/results: `<!-- value NAME -->78 %<!-- end -->`."""

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

from bench.model.step import GEOMETRIES, KERNELS_A_LAYER, MACHINES
from bench.model.tables import CARD_CONTEXT, DECODE_CONTEXT, card_table
from bench.report import decode_tables, kernel_tables, peer_tables

SPAN = re.compile(r"<!-- value ([\w.-]+) -->(.*?)<!-- end -->", re.DOTALL)


class NoValue(KeyError):
    """A value that the pages show and no result has."""


class Values(dict[str, str]):
    def __missing__(self, name: str) -> str:
        raise NoValue(name)


def values(folder: Path) -> Values:
    """By name. Those of results are of the first machine that has them; acceptance beside ours is from all."""
    found = {**of_geometries(), **of_the_model(), **of_engines(folder)}
    longer: dict[str, list[float]] = defaultdict(list)
    for machine in kernel_tables.machines(folder):
        for name, value in of_acceptance(machine).items():
            longer[name].append(value)
        for group in (of_steps, of_experts, of_products, of_texts, of_cells, of_peers):
            for name, value in group(machine).items():
                found.setdefault(name, value)
    return Values(found | {name: spread(values) for name, values in longer.items()})


def spread(values: list[float]) -> str:
    """Of shares in percent, with signs."""
    least, most = min(values), max(values)
    return f"{least:+.1f} %" if least == most else f"{least:+.1f} to {most:+.1f} %"


def filled(page: str, known: dict[str, str]) -> str:
    """The page with every span as it should be; KeyError names a value that no result has."""
    return SPAN.sub(lambda m: f"<!-- value {m[1]} -->{known[m[1]]}<!-- end -->", page)


def size(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"


def of_geometries() -> dict[str, str]:
    """Bytes and counts that follow from the models' shapes alone."""
    g, big = GEOMETRIES["smollm2"], GEOMETRIES["minimax-m2.7"]
    weights = g.target.weights(1) + g.head
    draft = g.draft.weights(1) + g.features
    one_byte = (draft + g.draft_head) / (2 * weights)
    found = {"weights": size(2 * weights), "draft-weights": f"{draft / 1e6:.1f}",
             "draft-head-weights": f"{g.draft_head / 1e6:.1f}", "draft-share": f"{100 * 2 * one_byte:.0f} %",
             "draft-share-int8": f"{100 * one_byte:.0f} %", "floor-of-dflash": f"{1 + one_byte:.2f}",
             "draft-head-bytes": size(g.draft_head), "head-bytes": size(2 * g.head),
             "draft-vocab": f"{g.draft_vocab:,}", "vocab": f"{g.vocab:,}", "experts": f"{big.target.experts}",
             "expert-weights": f"{big.target.mlp_weights / 1e6:.1f} million", "chosen": f"{big.target.chosen}",
             "experts-of-8": f"{big.target.coverage(8):.0f}", "card-layers": f"{big.target.layers}"}
    return found | {f"kv-{name}": size(each.target.kv_bytes()) for name, each in GEOMETRIES.items()}


def of_the_model() -> dict[str, str]:
    """Guesses of bench/model, and how far the servers that others measured are from what it expects."""
    machine = next(iter(MACHINES.values()))
    shares = sorted(int(share) for line in card_table() for share in re.findall(r"(\d+)% \|$", line))
    return {"model-share": f"{100 * machine.share:.0f} %", "model-reduce": f"{machine.reduce_us:.0f} µs",
            "model-gap": f"{machine.gap_us:.0f} µs", "model-kernels": f"{KERNELS_A_LAYER}",
            "card-context": f"{CARD_CONTEXT:,}", "decode-context": f"{DECODE_CONTEXT}",
            "measured-of-model": f"{shares[0]} to {shares[-1]} %"}


def of_steps(machine: Path) -> dict[str, str]:
    """Whole steps, ops against their limit, and the floor that the read bandwidth sets."""
    results = kernel_tables.kernel_results(machine)
    rows = [row for r in results for row in r["rows"] if "us" in row]
    by_op = {}
    for row in rows:
        by_op.setdefault(row["op"], []).append(row)
    found = {}
    if "baseline step" in by_op:  # the machine of the prose
        limits = [row["gbps"] / row["pct_of_limit"] * 100 for row in rows]
        g = GEOMETRIES["smollm2"]
        floor_ms = 2 * (g.target.weights(1) + g.head) / statistics.median(limits) / 1e6
        found |= {"read-gbps": f"{statistics.median(limits):.1f} GB/s", "floor": f"{floor_ms:.1f} ms",
                  "floor-rate": f"{1e3 / floor_ms:.0f} tokens/s"}
    for op, of in by_op.items():
        shares = [row["pct_of_limit"] for row in of]
        found[f"share-{op.replace(' ', '-')}"] = f"{kernel_tables.span(shares, 0)} %"
    steps = {op: by_op[op][0] for op in ("verify pass", "DFlash step") if op in by_op}
    ratios = {op: row["us"] / row["peers"]["baseline step"] for op, row in steps.items()
              if "baseline step" in row["peers"]}
    if len(ratios) == 2:
        verify, dflash = ratios.values()
        found |= {"verify-steps": f"{verify:.2f}", "dflash-steps": f"{dflash:.2f}",
                  "draft-steps": f"{dflash - verify:.2f}"}
    return found


def of_experts(machine: Path) -> dict[str, str]:
    """expert_mlp in 16 bits: its share of the limit with few rows of random routing, and the most that it computes."""
    rows = [row for r in kernel_tables.kernel_results(machine) for row in r["rows"]
            if row["op"] == "expert_mlp" and "us" in row and "8 bits" not in row["case"]]
    few = [row["pct_of_limit"] for row in rows if re.search(r"random, (1|8|16) rows$", row["case"])]
    return {"experts-few": f"{kernel_tables.span(few, 0)} %",
            "experts-rate": f"{max(row['tflops'] for row in rows):.2f} TFLOP/s"} if few else {}


def of_products(machine: Path) -> dict[str, str]:
    """Products of 8 rows: the share of their bound, over all shapes of weights of a kind under a set."""
    file = machine / "rows.json"
    products = json.loads(file.read_text(encoding="utf-8"))["products"] if file.exists() else []
    of = {}
    for p in products:
        if p["rows"] == 8:
            of.setdefault(f"rows-8-{p['weights']}-{p['isa']}", []).append(p["pct_of_bound"])
    return {name: f"{kernel_tables.span(shares, 0)} %" for name, shares in of.items()}


def of_texts(machine: Path) -> dict[str, str]:
    found = {}
    for r in decode_tables.decode_results(machine):
        if not r.get("temperature") and r["drafter"] != "random":
            on = f"{r['cpu']}, {r['isa']}"
            at = ("int8-" if r.get("weights") == "int8" else "") + f"c{r['concurrency']}"
            if r["isa"] == "amx":
                found |= {f"amx-{at}": f"{r['speedup']:.2f}", f"amx-length-{at}": f"{r['acceptance_length']:.2f}",
                          f"amx-prompts-{at}": str(r["limit"]), f"amx-machine-{at}": on}
            if not r["limit"]:
                found["all-tasks"] = ", ".join(f"{task} {t['requests']}" for task, t in r["tasks"].items())
                found |= {f"all-{at}": f"{r['speedup']:.2f}", f"all-length-{at}": f"{r['acceptance_length']:.2f}",
                          f"all-prompts-{at}": str(r["requests"]), f"all-machine-{at}": on}
    return found


def of_cells(machine: Path) -> dict[str, str]:
    """Speedups over the vector sets of a machine: of all tasks together by concurrency, and the worst of a task."""
    results = decode_tables.decode_results(machine, "decode by instruction set")
    cells = [c | {"limit": r["limit"]} for r in results for c in r["cells"] if c["isa"] != "generic"]
    if not cells:
        return {}
    found = {}
    for n in dict.fromkeys(c["concurrency"] for c in cells):
        of = [c for c in cells if c["concurrency"] == n]
        ratios = [c["speedup"] for c in of]
        found |= {f"cells-c{n}": kernel_tables.span(ratios, 2), f"cells-prompts-c{n}": str(of[0]["limit"])}
    found["cells-isas"] = ", ".join(dict.fromkeys(c["isa"] for c in cells))
    ratio, task, isa, n = min((t["speedup"], task, c["isa"], c["concurrency"]) for c in cells
                              for task, t in c["tasks"].items())
    r = results[0]
    return found | {"cells-worst": f"{ratio:.2f}", "cells-worst-where": f"{task}, {isa}, concurrency {n}",
                    "cells-machine": f"{r['cpu']}, {r['threads']} threads", "cells-tokens": str(r["max_tokens"])}


def of_peers(machine: Path) -> dict[str, str]:
    """Rates beside our baseline's with as many requests; what drafting gains on a file's blocks, over the instruction
    sets."""
    found, gains = {}, defaultdict(dict)
    for header, rows, *_ in peer_tables.results(machine):
        whole = peer_tables.whole(rows)
        rates = {(r["peer"], r["mode"], r["concurrency"]): r["tokens_per_s"] for r in whole}
        baseline = {c: rates[peer, mode, c] for peer, mode, c in rates
                    if (peer, mode) == (peer_tables.OURS, "baseline")}
        if peer_tables.is_timed(header):
            found |= {f"{peer}-{mode}-c{c}": f"{rate / baseline[c]:.2f}" for (peer, mode, c), rate in rates.items()
                      if c in baseline}
            for c in (c for peer, mode, c in rates if (peer, mode) == ("oursfile", peer_tables.DFLASH)):
                gains[c][peer_tables.isa_of(header)] = (rates["oursfile", peer_tables.DFLASH, c]
                                                        / rates["oursfile", "baseline", c])
                found |= {"file-prompts": str(header["limit"]),
                          "file-machine": f"{header['cpu']}, {header['threads']} threads"}
    for c, of in gains.items():
        found[f"file-c{c}"] = kernel_tables.span(list(of.values()), 2)
    return found | ({"file-isas": ", ".join(gains[1])} if 1 in gains else {})


def of_acceptance(machine: Path) -> dict[str, float]:
    """Acceptance lengths beside ours on most prompts, in percent."""
    found, most = {}, 0
    for header, rows, *_ in peer_tables.results(machine):
        drafted = {r["peer"]: r for r in peer_tables.whole(rows)
                   if r["mode"] == peer_tables.DFLASH and r["concurrency"] == 1}
        ours = drafted.get(peer_tables.OURS)
        if ours and {"dflash", "vllm"} <= {*drafted} and ours["prompts"] > most and header["dtype"] == "bfloat16":
            most = ours["prompts"]
            found = {f"longer-{peer}": 100 * (r["acceptance_length"] / ours["acceptance_length"] - 1)
                     for peer, r in drafted.items()}
    return found


def of_engines(folder: Path) -> dict[str, str]:
    """What the plugin adds to an engine's rate, over the machines where it was measured."""
    rates = [json.loads(file.read_text(encoding="utf-8"))["compare"]["tokens_per_s"]
             for file in folder.glob("*/engine-vllm.json")]
    gains = sorted({round(100 * (rate["with"] / rate["without"] - 1)) for rate in rates})
    return {"engine-gain": " to ".join(map(str, gains[:1] + gains[1:][-1:])) + " %"} if gains else {}
