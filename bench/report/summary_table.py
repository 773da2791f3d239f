"""docs/performance.md's first table: ops and steps beside their limits, then texts beside baseline decoding and other
decoders; and the five rows of it that README shows."""

from pathlib import Path

from bench.report import decode_tables, kernel_tables, peer_tables
from bench.report.commands import command_of, evaluate_command


def summary(folder: Path) -> str:
    """A table for each machine."""
    lines = []
    for machine in kernel_tables.machines(folder):
        rows = [*kernels(machine), *texts(machine), *others(machine)]
        if rows:
            results = kernel_tables.kernel_results(machine)
            lines += [*([kernel_tables.about(results[0]["header"]), ""] if results else []),
                      "| measurement | case | result | of the limit | relative speed |", "|---|---|---|---|---|", *rows,
                      "", "Commands:", "", *(f"- {rows_}: `{command}`" for command, rows_ in commands(machine).items()),
                      ""]
    return "\n".join(lines or [kernel_tables.EMPTY])


def commands(machine: Path) -> dict[str, str]:
    """What repeats the rows of each kind, and which those are."""
    timed = [header["command"] for header, *_ in peer_tables.results(machine) if peer_tables.is_timed(header)]
    texts = [evaluate_command(r) for r in decode_tables.decode_results(machine) if not r.get("temperature")]
    return {**({"make bench": "ops and steps"} if kernel_tables.kernel_results(machine) else {}),
            **dict.fromkeys(texts, "decoding"), **{command_of(c): "decoding, other decoders" for c in timed}}


def headline(folder: Path) -> str:
    """README's five rows, of the first machine that has them all: one and eight requests, many requests, another
    engine, an op. Under them, the machine and each row's command."""
    for machine in kernel_tables.machines(folder):
        rows, commands = [], []
        for found in (text_row(machine, 1), text_row(machine, 8), many_row(machine), engine_row(machine),
                      op_row(machine)):
            if found:
                rows.append(found[0])
                commands.append(found[1])
        if len(rows) == 5:
            about = op_header(machine)
            return "\n".join([
                "| | measurement | result | compared with | speedup |", "|---|---|---|---|---|",
                *(f"| {i + 1} | {row}" for i, row in enumerate(rows)), "",
                f"{about['device']}, {about['threads']} threads, {about['isa']}, torch {about['torch']}, bfloat16; row "
                f"5 of commit {about['commit']}. Rates count new tokens over the whole time, the prompts' passes "
                "included. Commands:", "",
                *(f"- {rows_of(commands, command)}: `{command}`" for command in dict.fromkeys(commands))])
    return kernel_tables.EMPTY


def rows_of(commands: list[str], command: str) -> str:
    found = [str(i + 1) for i, other in enumerate(commands) if other == command]
    return f"row{'s' * (len(found) > 1)} {', '.join(found)}"


def gains(known: dict[str, str]) -> str:
    """README's speedups by the target's weights and instruction set, from the numbers of bench.report.values."""
    rows = [(f"bfloat16, {known['all-machine-c1']}", f"all {known['all-prompts-c1']}", known["all-c1"], known["all-c8"],
             ""),
            (f"bfloat16, {known['cells-machine']}: {known['cells-isas']}", f"{known['cells-prompts-c1']} of each task",
             *(known[f"cells-c{n}"] for n in (1, 8, 32))),
            (f"4 bits, {known['file-machine']}: {known['file-isas']}", f"{known['file-prompts']} of each task",
             known["file-c1"], known["file-c8"], known["file-c32"]),
            (f"bfloat16, {known['amx-machine-c1']}", f"{known['amx-prompts-c1']} of each task", known["amx-c1"],
             known["amx-c8"], "")]
    return "\n".join(["| weights and machine | prompts | 1 request | 8 | 32 |", "|---|---|---|---|---|",
                      *(f"| {' | '.join(row)} |" for row in rows)])


def text_row(machine: Path, concurrency: int) -> tuple[str, str] | None:
    """Of drafts that pay, where they were measured."""
    for r in sorted(decode_tables.decode_results(machine), key=lambda r: r.get("adapts") is False):
        if (r["concurrency"], r.get("weights", "model"), bool(r.get("temperature"))) == (concurrency, "model", False) \
                and r["drafter"] != "random":
            same = "identical output" if r["identical_to_baseline"] else f"{r['different_requests']} outputs differ"
            requests = f"{concurrency} request{'s' * (concurrency > 1)}"
            return (f"{r['model']}, {requests}, {r['acceptance_length']:.2f} tokens a step | "
                    f"{r['tokens_per_s']:.0f} tokens/s | baseline decoding, {same}, "
                    f"{r['baseline_tokens_per_s']:.0f} tokens/s | {r['speedup']:.2f} |"), evaluate_command(r)
    return None


def timed_peers(machine: Path) -> list[tuple[dict, dict]]:
    """The header, and the rows of all tasks together by (peer, mode, concurrency), of each timed run."""
    return [(header, {(r["peer"], r["mode"], r["concurrency"]): r for r in peer_tables.whole(rows)})
            for header, rows, *_ in peer_tables.results(machine) if peer_tables.is_timed(header)]


def many_row(machine: Path) -> tuple[str, str] | None:
    """As many requests as were measured: there speculation may lose."""
    runs = [(max(concurrency for *_, concurrency in rows), header, rows) for header, rows in timed_peers(machine)]
    if not runs:
        return None
    most, header, rows = max(runs, key=lambda run: run[0])
    ours, baseline = (rows.get((peer_tables.OURS, mode, most)) for mode in (peer_tables.DFLASH, "baseline"))
    if most == 1 or ours is None or baseline is None:
        return None
    blocks = "blocks as they pay" if header.get("adapts") else f"blocks kept at {header['block_size']}"
    return (f"{header['model']}, {most} requests, {blocks} | "
            f"{ours['tokens_per_s']:.0f} tokens/s | baseline decoding, {baseline['tokens_per_s']:.0f} tokens/s | "
            f"{ours['tokens_per_s'] / baseline['tokens_per_s']:.2f} |"), command_of(header["command"])


def engine_row(machine: Path) -> tuple[str, str] | None:
    for header, rows in timed_peers(machine):
        ours, theirs = (rows.get((peer, peer_tables.DFLASH, 1)) for peer in (peer_tables.OURS, "vllm"))
        if ours and theirs:
            return (f"{header['model']}, 1 request, {ours['prompts']} prompts, our loop | "
                    f"{ours['tokens_per_s']:.0f} tokens/s | {peer_tables.NAMES['vllm']} with the same drafter, "
                    f"{theirs['tokens_per_s']:.0f} tokens/s | "
                    f"{ours['tokens_per_s'] / theirs['tokens_per_s']:.2f} |"), command_of(header["command"])
    return None


def op_rows(machine: Path) -> list[tuple[dict, dict]]:
    """The results and rows of the op that README shows."""
    return [(result, row) for result in kernel_tables.kernel_results(machine) for row in result["rows"]
            if row["op"] == "lm_head_argmax" and row.get("headline") and "torch.compile" in row["peers"]]


def op_header(machine: Path) -> dict:
    return op_rows(machine)[0][0]["header"]


def op_row(machine: Path) -> tuple[str, str] | None:
    if not (found := op_rows(machine)):
        return None
    result, row = found[0]
    other = row["peers"]["torch.compile"]
    return (f"`lm_head_argmax`, {row['case']} | {row['us']:.0f} µs, {row['pct_of_limit']:.0f} % of the read bandwidth "
            f"| torch.compile, {other:.0f} µs | {other / row['us']:.2f} |"), command_of(result["command"])


def kernels(machine: Path) -> list[str]:
    return [f"| `{row['op']}` | {row['case']} | {row['us']:.0f} µs | {row['pct_of_limit']:.0f} % | "
            f"{kernel_tables.against(row)} |"
            for r in kernel_tables.kernel_results(machine) for row in r["rows"] if row.get("headline")]


def texts(machine: Path) -> list[str]:
    found = sorted((r for r in decode_tables.decode_results(machine) if not r.get("temperature")),
                   key=lambda r: r["concurrency"])
    lines = []
    for r in found:
        same = "identical output" if r["identical_to_baseline"] else f"{r['different_requests']} outputs differ"
        lines.append(f"| decoding, concurrency {r['concurrency']} | {r['model']}{in_8_bits(r)}, "
                     f"{r['requests']} prompts, {r['acceptance_length']:.2f} tokens a step"
                     f"{kept_blocks(r)} | {r['tokens_per_s']:.1f} tokens/s | | "
                     f"{r['speedup']:.2f} x baseline decoding, {same} |")
    return lines


def kept_blocks(r: dict) -> str:
    return f", blocks kept at {r['block_size']}" if r.get("adapts") is False else ""


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
            name = peer_tables.named(r["peer"])
            if r["peer"] not in peer_tables.OUR_LOOP:
                name += ", baseline" if r["mode"] == "baseline" else " with DFlash" * (r["peer"] != "dflash")
                best[name] = max(best.get(name, 0.0), r["tokens_per_s"])
            elif r["mode"] == peer_tables.DFLASH:
                ours[name] = r
        isa = peer_tables.isa_of(header)
        lines += [f"| decoding, other decoders | {header['model']}, {name}, {isa}, {r['prompts']} prompts in turn | "
                  f"{r['tokens_per_s']:.1f} tokens/s | | "
                  + "; ".join(f"{r['tokens_per_s'] / rate:.2f} x {peer}" for peer, rate in best.items()) + " |"
                  for name, r in ours.items()]
    return lines
