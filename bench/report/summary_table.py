"""The README's one table: ops and steps beside their limits, then texts beside baseline decoding and other decoders."""

from pathlib import Path

from bench.report import decode_tables, kernel_tables, peer_tables


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
    lines = []
    for r in found:
        same = "the same text" if r["identical_to_baseline"] else f"{r['different_requests']} texts differ"
        lines.append(f"| text, {r['concurrency']} concurrent | {r['model']}{in_8_bits(r)}, {r['requests']} prompts, "
                     f"{r['acceptance_length']:.2f} tokens a step | {r['tokens_per_s']:.1f} tokens/s | | "
                     f"{r['speedup']:.2f} x baseline decoding, {same} |")
    return lines


def in_8_bits(r: dict) -> str:
    return " in 8 bits" if r.get("weights") == "int8" else ""


def others(machine: Path) -> list[str]:
    """Our rates on the peers' prompts, and how many times each peer's best they are."""
    lines = []
    for header, rows, *_ in peer_tables.results(machine):
        if not peer_tables.is_timed(header):
            continue
        best, ours = {}, {}
        for r in (r for r in peer_tables.whole(rows) if r["concurrency"] == 1):
            name = peer_tables.NAMES.get(r["peer"], r["peer"]) + ", baseline" * (r["mode"] == "baseline")
            if r["peer"] not in (peer_tables.OURS, peer_tables.OURS_TOO):
                best[name] = max(best.get(name, 0.0), r["tokens_per_s"])
            elif r["mode"] == peer_tables.DFLASH:
                ours[name] = r
        lines += [f"| text, beside others | {header['model']}, {name}, {r['prompts']} prompts in turn | "
                  f"{r['tokens_per_s']:.1f} tokens/s | | "
                  + "; ".join(f"{r['tokens_per_s'] / rate:.2f} x {peer}" for peer, rate in best.items()) + " |"
                  for name, r in ours.items()]
    return lines
