"""One page of the results of `make gpu`, from its files: python -m bench.gpu.summary FOLDER"""

import json
import sys
from pathlib import Path

LINES = 76  # of cases, those that were measured first


def load(folder: Path, name: str) -> dict:
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def page(folder: Path) -> str:
    lines = [*plan_lines(load(folder, "plan")), *case_lines(load(folder, "cases")),
             *profile_lines(load(folder, "profile")), *sweep_lines(load(folder, "sweep"))]
    return "\n".join(lines) + "\n"


def plan_lines(plan: dict) -> list[str]:
    if not plan:
        return []
    lines = [f"make gpu at {plan['commit']}, {plan['seconds']} s:"]
    return lines + [f"  {name}: {what}" for name, what in plan["commands"].items()]


def case_lines(cases: dict) -> list[str]:
    if not cases:
        return []
    h, rows = cases["header"], cases["rows"]
    old = sum(row.get("commit") != h["commit"] for row in rows)
    right, wrong = ([row for row in rows if ("wrong" in row) == bad] for bad in (False, True))
    lines = [f"{h['device']}, torch {h['torch']}, triton {h.get('triton')}: copies {h['copy_gbps']} GB/s, "
             f"{h['matrix_tflops']} TFLOP/s. us, floor, of the limit; against:"]
    lines += [f"  WRONG {row['op']} {row['case']}: {row['wrong']}" for row in wrong]
    for row in right[:LINES]:
        peers = ", ".join(f"{us / row['us']:.2f} x {name}" for name, us in row["peers"].items())
        lines.append(f"  {row['op']:<15} {row['case']:<50} {row['us']:9.1f} {row['floor_us']:8.1f} "
                     f"{row['pct_of_limit']:4.0f} %  {peers}".rstrip())
    more = len(right) - LINES
    lines += [f"  and {more} more in cases.json"] if more > 0 else []
    return lines + ([f"  {old} of these are of an earlier commit"] if old else [])


def profile_lines(profile: dict) -> list[str]:
    lines = []
    for step in profile.get("steps", ()):
        lines.append(f"one replay at {profile['commit']} of {step['step']}: {step['us']:.0f} us, "
                     f"{step['kernels_us']:.0f} in {step['launches']} kernels, {step['gaps_us']:.0f} in gaps")
        lines += [f"  {k['us']:9.1f} us {k['count']:4} x {k['name'][:60]}" for k in step["kernels"][:8]]
    return lines


def sweep_lines(sweep: dict) -> list[str]:
    lines = []
    for entry in sweep.get("entries", ()):
        if entry.get("best"):
            lines.append(f"  {entry['table']} {entry['key']}: {entry['best']} in place of {entry['now']}, "
                         f"{entry['gain']:.2f} x as fast")
    if sweep:
        tried = sum(len(e["tried"]) for e in sweep["entries"])
        lines.insert(0, f"launch tables at {sweep['commit']}: {len(sweep['entries'])} entries, {tried} settings, "
                        f"{len(lines)} are better:")
    return lines


if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
