"""Writes the generated pages: tables and plots from bench/results, docs/ops.md from the ops' docstrings.

`make docs` runs it. tests/bench/test_docs.py fails when a page is out of date.
"""

import inspect
from pathlib import Path

import dflash_kernels
from bench import ROOT
from bench.model import tables as step_tables
from bench.report import decode_tables, draw, engine_tables, kernel_tables, peer_tables, summary_table

PLOTS = ROOT / "docs" / "plots"


def plots_block(folder: Path) -> str:
    lines = [f"![{plot.caption}](plots/{name})\n\n{plot.caption}\n" for name, plot in draw.plots(folder).items()]
    return "\n".join(lines or [kernel_tables.EMPTY])


def with_block(page: str, name: str, block: str) -> str:
    """The page with a new block between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"


def ops_page() -> str:
    parts = ["# Ops", "", "Made by `make docs` from the docstrings. B requests, Q block length, T tokens, "
             "Hq/Hkv heads, D head dim, P page size, V vocabulary, H hidden, L draft layers. No op has a gradient: "
             "what it returns does not require one, whatever its inputs do.", ""]
    for name in dflash_kernels.__all__:
        item = getattr(dflash_kernels, name)
        signature = "" if inspect.isclass(item) else str(inspect.signature(item)).replace("torch.Tensor", "Tensor")
        parts += [f"## {name}", "", "```text", f"{name}{signature}", "", inspect.getdoc(item), "```", ""]
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """The up-to-date text of every generated page."""
    results = ROOT / "bench" / "results"
    docs = ROOT / "docs"
    made = {ROOT / "README.md": {"results": summary_table.summary(results)},
            docs / "engines.md": {"results": engine_tables.engines_block(results)},
            docs / "performance.md": {
                "limits": kernel_tables.limits_block(results), "decode": decode_tables.decode_block(results),
                "peers": peer_tables.peers_block(results), "protocol": decode_tables.protocol_block(results),
                "model": "\n".join(step_tables.tables(results)), "plots": plots_block(results),
                "loops": (results / "aot" / "loops.md").read_text(encoding="utf-8")}}
    for card in (ROOT / "drafters").glob("*/README.md"):
        made[card] = {"results": decode_tables.card_block(results, card.parent.name)}
    found = {docs / "ops.md": ops_page(), docs / "cases.md": kernel_tables.cases_page(results)}
    for page, blocks in made.items():
        text = page.read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = with_block(text, name, block)
        found[page] = text
    return found


def old_plots(folder: Path = PLOTS, results: Path = ROOT / "bench" / "results") -> list[str]:
    """Pictures that are missing, outdated or no longer wanted."""
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
