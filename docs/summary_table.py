"""The README's one table: ops and steps beside their limits, then texts beside plain decoding and other decoders."""

from pathlib import Path

import decode_tables
import kernel_tables
import peer_tables


def summary(folder: Path) -> str:
    """A table for each machine."""
    lines = []
    for machine in sorted(f for f in folder.iterdir() if f.is_dir()):
        rows = [*kernels(machine), *texts(machine), *others(machine)]
        if rows:
            results = kernel_tables.kernel_results(machine)
            lines += [*([kernel_tables.about(results[0]["header"]), ""] if results else []),
                      "| what | case | measured | of the limit | speed against |", "|---|---|---|---|---|", *rows, ""]
    return "\n".join(lines or [kernel_tables.EMPTY])


def kernels(machine: Path) -> list[str]:
    return [f"| `{row['op']}` | {row['case']} | {row['us']:.0f} µs | {row['pct_of_limit']:.0f} % | "
            f"{kernel_tables.against(row)} |"
            for r in kernel_tables.kernel_results(machine) for row in r["rows"] if row.get("headline")]


def texts(machine: Path) -> list[str]:
    found = sorted((r for r in decode_tables.decode_results(machine) if not r.get("temperature")),
                   key=lambda r: r["concurrency"])
    return [f"| text, {r['concurrency']} at once | {r['model']}, {r['requests']} prompts, {r['acceptance_length']:.2f} "
            f"tokens a step | {r['tokens_per_s']:.1f} tokens/s | | {r['speedup']:.2f} x plain decoding, "
            f"{'the same text' if r['identical_to_plain'] else str(r['different_requests']) + ' texts differ'} |"
            for r in found]


def others(machine: Path) -> list[str]:
    """Our rate on the peers' prompts, and how many times each peer's best it is."""
    lines = []
    for header, rows, *_ in peer_tables.results(machine):
        alone = [r for r in peer_tables.whole(rows) if r["concurrency"] == 1]
        ours = next((r for r in alone if (r["peer"], r["mode"]) == (peer_tables.OURS, peer_tables.DFLASH)), None)
        if ours is None or not peer_tables.is_timed(header):
            continue
        best = {}
        for r in alone:
            if r["peer"] != peer_tables.OURS:
                name = peer_tables.NAMES.get(r["peer"], r["peer"]) + ", plain" * (r["mode"] == "plain")
                best[name] = max(best.get(name, 0.0), r["tokens_per_s"])
        ratios = "; ".join(f"{ours['tokens_per_s'] / rate:.2f} x {name}" for name, rate in best.items())
        lines.append(f"| text, beside others | {header['model']}, {ours['prompts']} prompts in turn | "
                     f"{ours['tokens_per_s']:.1f} tokens/s | | {ratios} |")
    return lines
