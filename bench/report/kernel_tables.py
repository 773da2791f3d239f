"""Tables of ops and steps with their bandwidth limits and peers, from the results of bench/ops."""

import json
from pathlib import Path

EMPTY = "No results yet: `make bench` measures and fills this in."


def hardware(h: dict) -> tuple[str, str]:
    """The machine of a header, and the name of the bandwidth that was its limit."""
    if "cuda" in h:
        return f"CUDA {h['cuda']}, triton {h['triton']}", "copy"
    return f"{h['threads']} threads, {h['isa']}", "read"


def cases_page(folder: Path) -> str:
    """Every case of every op, in one table per machine."""
    lines = ["# All benchmark cases", "",
             "`make docs` generates this page from the results of `make bench` and `make gpu`. A row is one case. "
             "Its inputs rotate over up to 256 copies, 192 MB if they are that large, and its limit was measured "
             "before each of its calls; outputs that every copy writes stay in a CPU's caches and are not counted.",
             ""]
    for machine in machines(folder):
        results = kernel_results(machine)
        if not results:
            continue
        h, rows = results[0]["header"], [row for r in results for row in r["rows"] if "us" in row]
        lines += [f"## {h['device']}", "", about(h), "",
                  "| op | case | µs, median [p20 to p80] | GB/s | of the limit | TFLOP/s | relative speed |",
                  "|---|---|---|---|---|---|---|"]
        lines += [f"| `{row['op']}` | {row['case']} | {row['us']:.1f} [{row['p20']:.1f} to {row['p80']:.1f}] | "
                  f"{row['gbps']:.1f} | {row['pct_of_limit']:.0f} % | {row['tflops']:.3f} | {against(row)} |"
                  for row in rows]
        without = dict.fromkeys(why for row in rows for why in row.get("without", {}).values())
        lines += ["", "Not timed: " + "; ".join(without) + "."] if without else []
        lines.append("")
    return "\n".join(lines)


def machines(folder: Path) -> list[Path]:
    """The folders of machines: those whose steps were measured first, which prose is about, then by name."""
    return sorted((f for f in folder.iterdir() if f.is_dir()), key=lambda f: (not (f / "step.json").is_file(), f.name))


def kernel_results(machine: Path) -> list[dict]:
    """The results of bench/ops in a machine's folder."""
    found = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(machine.glob("*.json"))]
    return [r for r in found if isinstance(r, dict) and "device" in r.get("header", ()) and r.get("rows")]


def about(h: dict) -> str:
    what, limit = hardware(h)
    return (f"{h['device']}, {what}, torch {h['torch']}, bfloat16, commit {h['commit']}. The limit is the {limit} "
            "bandwidth, measured between the calls of the same run.")


def against(row: dict) -> str:
    """Compares a step with the baseline step that it contains, and an op with its peers."""
    return ", ".join(f"takes {row['us'] / us:.2f} baseline steps" if name == "baseline step" else
                     f"{us / row['us']:.2f} x {name}" for name, us in row["peers"].items())


def limits_block(folder: Path) -> str:
    """For each op and machine, over all cases: the share of the limit and the speed relative to each peer."""
    lines = []
    for machine in machines(folder):
        results = kernel_results(machine)
        rows = [row for r in results for row in r["rows"] if "us" in row]
        if not rows:
            continue
        h = results[0]["header"]
        limits = sorted(row["gbps"] / row["pct_of_limit"] * 100 for row in rows)
        lines += [f"{h['device']}, {hardware(h)[0]}: the limit was {limits[0]:.1f} to {limits[-1]:.1f} GB/s.", "",
                  "| op | cases | of the limit | relative speed |", "|---|---|---|---|"]
        for op in dict.fromkeys(row["op"] for row in rows):
            of = [row for row in rows if row["op"] == op]
            ratios = {peer: [row["peers"][peer] / row["us"] for row in of if peer in row["peers"]]
                      for peer in dict.fromkeys(p for row in of for p in row["peers"])}
            ratio = ", ".join(f"{span([1 / r for r in values], 2)} {peer}s" if peer == "baseline step" else
                              f"{span(values, 2)} x {peer}" for peer, values in ratios.items())
            lines.append(f"| `{op}` | {len(of)} | {span([row['pct_of_limit'] for row in of], 0)} % | {ratio} |")
        lines.append("")
    return "\n".join(lines or [EMPTY])


def span(values: list[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
