"""Runs the protocol: the answerer, a progress bar, the two tables of the card, and the results file."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dflash_decode.choices import NONE
from dflash_decode.cli import report
from dflash_decode.session import Session
from dflash_kernels import build_info

from .answerers import OurLoop, Server
from .chat import ChatServer
from .decode import Prompt
from .protocol import CARD_ACCEPTANCE, CARD_THROUGHPUT, NOT_REPORTED, TASKS, Answerer, Journal, Stage, figures, measure
from .results import commit, write_json

CARD = "MiniMax-M2.7 on 4 B200"


def our_loop(model: str, drafter: str, block_size: int | None, max_tokens: int, dtype: str, device: str,
             weights: str = "model", drafter_weights: str = "auto") -> OurLoop:
    from dflash_decode.checkpoint import drafter_of

    baseline = drafter_of(model, drafter) == NONE
    session = Session.load(model, drafter, block_size=None if baseline else block_size, dtype=dtype, device=device,
                           weights=weights, drafter_weights=drafter_weights, status=report.status)
    report.start_text(session)
    return OurLoop(session, max_tokens)


def server(base_url: str, model: str | None, max_tokens: int, extra: dict) -> Server:
    chat = ChatServer(base_url, model, api_key=os.environ.get("OPENAI_API_KEY"), extra=extra)
    return Server(chat, max_tokens, extra)


def run(answerer: Answerer, prompts: Sequence[Prompt], concurrencies: Sequence[int], journal_file: Path,
        json_out: Path | None, source: dict) -> None:
    """Measures the prompts that the journal lacks, prints the tables and writes the results."""
    about = answerer.about | source | where(answerer)
    journal = Journal(journal_file, about)
    wanted = len(prompts) * len(concurrencies)
    kept = sum(row["prompts"] for row in figures(journal, prompts, concurrencies))
    if kept:
        report.notice(f"{kept} of {wanted} prompts are in {journal_file} already; remove it to measure them again")
    try:
        with Watch() as watch:
            measure(answerer, prompts, concurrencies, journal, watch)
    finally:
        rows = figures(journal, prompts, concurrencies)
        finished = sum(row["prompts"] for row in rows)
        if finished < wanted:
            report.notice(f"{finished} of {wanted} prompts are kept in {journal_file}; the same command continues with "
                          "the rest")
        elif json_out is not None:
            names = {key: Path(about[key]).name for key in ("model", "drafter")  # folders are a machine's own
                     if key in about and Path(about[key]).is_absolute()}
            write_json(json_out, {"kind": "protocol", **about, **names, "rows": rows})
    print_tables(rows)


def where(answerer: Answerer) -> dict:
    """The machine and versions of a measurement. The machine of a server is unknown."""
    if isinstance(answerer, Server):
        return {}
    info = build_info()
    return {"cpu": info["cpu"], "threads": torch.get_num_threads(), "isa": info["isa"], "torch": info["torch"],
            "commit": commit()}


class Watch:
    """A progress bar with the remaining time on a terminal's standard error; elsewhere one line per finished task."""

    def __init__(self):
        columns = (TextColumn("[dim]{task.description}[/dim]"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        # By itself the bar forgets after 30 seconds, which one answer of 4,096 tokens may take.
        self.progress = Progress(*columns, console=report.err, disable=not report.err.is_terminal, transient=True,
                                 speed_estimate_period=math.inf)
        self.stage: Stage | None = None
        self.bar: TaskID | None = None

    def __enter__(self) -> "Watch":
        self.progress.start()
        return self

    def __exit__(self, *_error) -> None:
        self.progress.stop()

    def __call__(self, stage: Stage) -> None:
        name = escape(f"{TASKS.get(stage.task, stage.task)}, {stage.concurrency} concurrent")
        if stage is not self.stage:
            if self.bar is not None:
                self.progress.remove_task(self.bar)
            self.bar = None
        if self.bar is None:
            self.stage, self.bar = stage, self.progress.add_task(name, total=stage.total, completed=stage.done, rate="")
        rate = f"{stage.tokens / stage.seconds:.1f} tokens/s" if stage.seconds else ""
        self.progress.update(self.bar, completed=stage.done, rate=rate)
        if rate and stage.done == stage.total and not report.err.is_terminal:
            report.err.print(f"{name}: {stage.total} prompt{'s' * (stage.total > 1)}, {rate}")


def print_tables(rows: list[dict]) -> None:
    """The two tables of the card, with the card's own values below ours."""
    tasks = [*TASKS, *dict.fromkeys(row["task"] for row in rows if row["task"] not in TASKS)]
    found = {(row["concurrency"], row["task"]): row for row in rows}

    def show(title: str, key: str, card: dict, form: str):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold")
        for column in ("concurrency", *(escape(TASKS.get(task, task)) for task in tasks)):
            table.add_column(column, justify="left" if column == "concurrency" else "right")
        for concurrency in dict.fromkeys(c for c, _ in found):
            cells = [cell(found.get((concurrency, task)), key, form) for task in tasks]
            table.add_row(str(concurrency), *cells)
        for concurrency, values in card.items():
            cells = [format(values[task], form) if task in values else "" for task in tasks]
            table.add_row(f"{concurrency}, {CARD}", *cells, style="dim")
        report.out.print(table)

    show("Throughput, tokens/s", "tokens_per_s", CARD_THROUGHPUT, ".1f")
    report.out.print()
    show("Acceptance length", "acceptance_length", CARD_ACCEPTANCE, ".3f")
    for note in notes(rows):
        report.notice(note)


def cell(row: dict | None, key: str, form: str) -> str:
    if row is None:
        return ""
    value = NOT_REPORTED if row[key] is None else format(row[key], form)
    return value if row["prompts"] == row["of"] else f"{value} ({row['prompts']} of {row['of']})"


def notes(rows: Iterable[dict]) -> list[str]:
    """Notes for a reader of the tables."""
    rows, found = list(rows), []
    if sources := {row["acceptance_from"] for row in rows} - {"steps", NOT_REPORTED}:
        found.append(f"the acceptance length is the server's own: {', '.join(sorted(sources))}, whoever asked")
    if few := [f"{TASKS.get(row['task'], row['task'])} {row['of']} of {row['concurrency']}" for row in rows
               if row["of"] < row["concurrency"]]:
        found.append(f"there are fewer prompts than concurrent requests: {', '.join(few)}")
    if retries := sum(row["retries"] for row in rows):
        found.append(f"{retries} requests were sent again; their time counts")
    if any(row["runs"] > 1 for row in rows):
        found.append("a run was interrupted: what it began and did not finish counts in its time, and in its tokens "
                     "where they are known, which a server's are not")
    return found
