"""Prints the results of `dflash-kernels bench decode`."""

from rich.markup import escape
from rich.table import Table

from dflash_decode.cli.report import out


def print_bench(results: list[dict]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    drawn = any(result["temperature"] for result in results)
    cells = any("isa" in result for result in results)
    for column in (*("T",) * drawn, *("isa", "requests") * cells, "task", "prompts", "tokens", "acceptance",
                   "tokens/s", "baseline", "speedup", "rows", "identical"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for result in results:
        for task, r in [*result["tasks"].items(), ("all", result)]:
            same = "yes" if r["identical_to_baseline"] else f"{r['different_requests']} differ"
            table.add_row(*(f"{result['temperature']:g}",) * drawn,
                          *(result.get("isa", ""), str(result.get("concurrency", ""))) * cells, escape(task),
                          str(r["requests"]), str(r["tokens"]),
                          f"{r['acceptance_length']:.2f}", f"{r['tokens_per_s']:.1f}",
                          f"{r['baseline_tokens_per_s']:.1f}", f"{r['speedup']:.2f}", f"{r['verified_rows']:.2f}", same)
    out.print(table)
