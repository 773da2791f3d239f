"""Writes the generated pages: tables and plots from bench/results, docs/ops.md from the ops' docstrings.

`make docs` runs it. tests/bench/test_docs.py fails when a page is out of date.
"""

from pathlib import Path

from bench import ROOT
from bench.model import tables as step_tables
from bench.report import (
    decode_tables,
    drafters_table,
    draw,
    engine_tables,
    kernel_tables,
    peer_tables,
    perplexity_table,
    quantised_table,
    rows_table,
    servers_table,
    states_table,
    summary_table,
    values,
    wheel_table,
)
from bench.report.ops_page import ops_page

PLOTS = ROOT / "docs" / "plots"


def plots_block(folder: Path) -> str:
    """All but README's picture."""
    lines = [f"![{plot.caption}](plots/{name})\n\n{plot.caption}\n" for name, plot in draw.plots(folder).items()
             if not name.startswith("overview-")]
    return "\n".join(lines or [kernel_tables.EMPTY])


def picture_block(folder: Path) -> str:
    """README's one picture, of the first machine that has it."""
    found = [f"![{plot.caption}](docs/plots/{name})" for name, plot in draw.plots(folder).items()
             if name.startswith("overview-")]
    return (found or [kernel_tables.EMPTY])[0]


def with_block(page: str, name: str, block: str) -> str:
    """The page with a new block between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"


def pages() -> dict[Path, str]:
    """The up-to-date text of every generated page."""
    results = ROOT / "bench" / "results"
    docs = ROOT / "docs"
    known = values.values(results)
    made = {ROOT / "README.md": {"results": summary_table.headline(results), "picture": picture_block(results),
                                 "gains": summary_table.gains(known)},
            docs / "channels.md": {"wheel": wheel_table.wheel_block(results)},
            docs / "drafters.md": {"drafters": drafters_table.drafters_block()},
            docs / "engines.md": {"results": engine_tables.engines_block(results)},
            docs / "performance.md": {
                "summary": summary_table.summary(results),
                "limits": kernel_tables.limits_block(results), "rows": rows_table.rows_block(results),
                "perplexity": perplexity_table.perplexity_block(results),
                "quantised": quantised_table.quantised_block(results),
                "servers": servers_table.servers_block(results), "states": states_table.states_block(results),
                "decode": decode_tables.decode_block(results),
                "peers": peer_tables.peers_block(results), "protocol": decode_tables.protocol_block(results),
                "model": "\n".join(step_tables.tables(results)), "plots": plots_block(results),
                "loops": (results / "aot" / "loops.md").read_text(encoding="utf-8")}}
    for card in (ROOT / "drafters").glob("*/README.md"):
        names = {card.parent.name, *(package.parent.name for package in card.parent.glob("*/config.json"))}
        made[card] = {"results": decode_tables.card_block(results, names)}
    found = {docs / "ops.md": ops_page(), docs / "cases.md": kernel_tables.cases_page(results)}
    for page, blocks in made.items():
        text = page.read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = with_block(text, name, block)
        found[page] = values.filled(text, known)
    return found


def old_plots(folder: Path = PLOTS, results: Path = ROOT / "bench" / "results") -> list[str]:
    """Pictures that are missing, outdated or no longer wanted."""
    wanted = draw.plots(results)
    there = {file.name: draw.stamp_of(file) for file in folder.glob("*.png")}
    return sorted(name for name in {*wanted, *there} if name not in wanted or there.get(name) != wanted[name].stamp)


def main() -> None:
    try:
        made = pages()
    except values.NoValue as missing:  # such as of a run over all prompts, which one over a few has overwritten
        raise SystemExit(f"bench.report: the pages show {missing}, which no result in bench/results has now. Results "
                         "are kept, pages are as they were.") from None
    for page, text in made.items():
        page.write_text(text, encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    wanted = draw.plots(ROOT / "bench" / "results")
    for name in old_plots():
        if name in wanted:
            draw.write(wanted[name], PLOTS / name)
        else:
            (PLOTS / name).unlink()
