"""Compares other projects' loops with ours on the same prompts and the same drafter, greedy.

    python -m bench.peers --prompts FILE... [--drafter DIR] [--limit N] [--only ours,dflash,...] [--json OUT]

Each peer is a process in its own environment. It is loaded and warmed up before anything is timed, and idle while
another answers. In every round each peer answers the same prompts task by task, in the opposite order the next time, so
that anything that slows the machine slows all alike. A rate is the median of the rounds. After the rounds each peer
answers the first prompt of each task once more with its passes timed, which gives the parts of a step.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bench.case import results_folder  # noqa: E402
from bench.peers import gguf_8bit, gguf_drafter  # noqa: E402
from bench.peers import peer as peers  # noqa: E402
from bench.peers.export import export  # noqa: E402
from bench.peers.job import BASELINE, Job, Question, Reply  # noqa: E402
from bench.peers.sums import ALL, STEP_PARTS, Key, Rows, parts_row  # noqa: E402
from dflash_bench.decode import read_prompts  # noqa: E402
from dflash_bench.results import commit, output, write_json  # noqa: E402
from dflash_decode.checkpoint import drafter_of, find_model  # noqa: E402
from dflash_decode.checkpoint.errors import read_json  # noqa: E402
from dflash_decode.checkpoint.tokenizer import load_tokenizer  # noqa: E402
from dflash_decode.model.config import read_draft_config  # noqa: E402
from dflash_kernels import build_info

WARM_UP_TOKENS = 16
BFLOAT16, MODEL = "bfloat16", "smollm2"
NAMES = [peer.name for peer in peers.PEERS]
OUT = Console(highlight=False, soft_wrap=True)
WIDE = 150  # columns of the table, also where the output is a file


@dataclass(frozen=True)
class Unit:
    """One unit of questions: the prompts of a task in sequence, or concurrent prompts of all tasks."""

    task: str
    prompts: list[list[int]]
    concurrency: int = 1


def read_tasks(options: argparse.Namespace, tokenizer) -> list[Unit]:
    """One unit per task with the first `limit` prompts of each file; for each higher concurrency a unit with as many
    prompts, the first ones of every file."""
    tasks: dict[str, list[list[int]]] = {}
    for file in options.prompts:
        for prompt in read_prompts(file):
            text = tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}])
            tasks.setdefault(prompt.task, []).append(tokenizer.encode(text))
    units = [Unit(task, prompts[:options.limit]) for task, prompts in tasks.items() if 1 in options.concurrency]
    for concurrency in (n for n in options.concurrency if n > 1):
        share = -(-concurrency // len(tasks))
        units.append(Unit(ALL, [p for prompts in tasks.values() for p in prompts[:share]][:concurrency], concurrency))
    return units


def forms(model: str, draft: str | None, needed: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The model and the drafter in the form that each kind of reader takes."""
    where, found = find_model(model), {"model": model}
    if where.suffix == ".gguf":
        found["gguf"] = str(where)
        if "gguf8" in needed:
            eight = peers.ENVIRONMENTS / "models" / f"{where.stem}-q8_0.gguf"
            found["gguf8"] = str(eight if eight.is_file() else gguf_8bit.write(str(where), eight))
        if "folder" in needed:
            folder = peers.ENVIRONMENTS / "models" / where.stem
            found["folder"] = str(folder if (folder / "config.json").is_file() else export(model, folder))
    else:
        found["folder"] = str(where)
    drafts = {} if draft is None else {"model": draft, "folder": draft}
    if drafts and "gguf" in found and needed & {"gguf", "gguf8"}:
        file = peers.ENVIRONMENTS / "models" / f"{Path(draft).name}.gguf"
        drafts["gguf"] = drafts["gguf8"] = str(gguf_drafter.write(draft, found["gguf"], file))
    return found, drafts


def block_size(options: argparse.Namespace) -> int:
    if options.block_size or not options.drafter:
        return options.block_size or 1
    return read_draft_config(read_json(Path(options.drafter) / "config.json")).block_size


def command(options: argparse.Namespace) -> str:
    """The command that repeats the run, without this machine's folders."""
    def words(name, values):
        return [f"--{name}", *map(str, values)] if values else []

    packaged = options.drafter == drafter_of(options.model)
    draft = "none" if options.drafter is None else "auto" if packaged else Path(options.drafter).name
    named = Path(options.model).name if Path(options.model).exists() else options.model
    isa = os.environ.get("DFLASH_ISA")
    return shlex.join([*([f"DFLASH_ISA={isa}"] if isa else []), "python", "-m", "bench.peers",
                       *words("prompts", [f.name for f in options.prompts]),
                       *words("model", [named] if named != MODEL else []),
                       *words("drafter", [draft]),
                       *words("limit", [options.limit] if options.limit else []),
                       *words("max-tokens", [options.max_tokens]), *words("concurrency", options.concurrency),
                       *words("rounds", [options.rounds]), *words("threads", [options.threads]),
                       *words("block-size", [options.block_size] if options.block_size else []),
                       *words("only", [",".join(options.only)] if options.only != NAMES else []),
                       *words("dtype", [options.dtype] if options.dtype != BFLOAT16 else [])])


@dataclass
class Measurement:
    """The running peers, their results so far, and the reasons for missing peers."""

    options: argparse.Namespace
    header: dict
    running: dict[peers.Turn, peers.Running]
    rows: Rows
    missing: dict[str, str]
    watched: dict[peers.Turn, list[Reply]] = field(default_factory=dict)

    def start(self, order: list[peers.Turn], models: dict, drafts: dict, stop_ids: list[int], units: list[Unit]):
        longest = max(len(p) for unit in units for p in unit.prompts) + self.options.max_tokens
        concurrency, warm = max(unit.concurrency for unit in units), units[0].prompts[:1]
        for turn in order:
            draft = None if turn.mode == BASELINE else drafts.get(turn.peer.reads)
            job = Job(turn.mode, models.get(turn.peer.reads, ""), draft, self.header["block_size"], longest,
                      concurrency if turn.peer.batches else 1, turn.threads, stop_ids, self.options.dtype,
                      turn.peer.weights, self.options.block_size is None)
            began = time.perf_counter()
            with self.surviving(turn):
                self.running[turn] = running = peers.Running(turn, job, self.options.timeout)
                running.ask(Question(warm, min(WARM_UP_TOKENS, self.options.max_tokens)))
                self.header["versions"][turn.peer.name] = running.versions
                OUT.print(f"{turn}: ready after {time.perf_counter() - began:.0f} s", markup=False)

    def measure(self, units: list[Unit]) -> Iterator[None]:
        """Stops after every answer."""
        number = 0
        for round_ in range(1, self.options.rounds + 1):
            for unit in units:
                number += 1
                able = [turn for turn in self.running if turn.peer.batches or unit.concurrency == 1]
                for turn in able[:: 1 if number % 2 else -1]:
                    with self.surviving(turn):
                        self.answer(turn, unit, round_)
                        yield

    def answer(self, turn: peers.Turn, unit: Unit, round_: int) -> None:
        """One token of each prompt tells how much of the time is the prompts'."""
        running, most = self.running[turn], self.options.max_tokens
        first = running.ask(Question(unit.prompts, 1)).seconds if unit.concurrency == 1 else 0.0
        reply = running.ask(Question(unit.prompts, most, unit.concurrency))
        self.rows.add(Key(turn.peer.name, turn.mode, turn.threads, unit.concurrency, unit.task), reply, first)
        OUT.print(f"round {round_}, {unit.task}, concurrency {unit.concurrency}: {turn}: "
                  f"{sum(reply.counts) / reply.seconds:.1f} tokens/s", markup=False)

    def watch(self, units: list[Unit]) -> Iterator[None]:
        """Stops after every answer. Later than all rounds: timing its passes may change what a peer's step takes."""
        for unit in (unit for unit in units if unit.concurrency == 1):
            for turn in list(self.running):
                with self.surviving(turn):
                    asked = Question(unit.prompts[:1], self.options.max_tokens, watched=True)
                    reply = self.running[turn].ask(asked)
                    self.watched.setdefault(turn, []).append(reply)
                    yield

    def surviving(self, turn: peers.Turn) -> "_Surviving":
        return _Surviving(self, turn)

    def close(self) -> None:
        for running in self.running.values():
            running.close()

    def result(self) -> dict:
        parts = [parts_row((t.peer.name, t.mode, t.threads), replies) for t, replies in self.watched.items()]
        return {"header": self.header, "rows": self.rows.rows(), "parts": parts, "missing": self.missing}


@dataclass
class _Surviving:
    """Continues after a peer fails: it is missing from then on, with the reason."""

    measurement: Measurement
    turn: peers.Turn

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if not isinstance(error, RuntimeError):
            return False
        self.measurement.running.pop(self.turn, None)
        self.measurement.missing[str(self.turn)] = str(error)
        OUT.print(f"{self.turn}: missing: {error}", markup=False)
        return True


def measure(options: argparse.Namespace) -> dict:
    peers.ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(options.model)
    units = read_tasks(options, tokenizer)
    order = peers.turns(options.only, options.threads, options.drafter is not None)
    header = {"kind": "peers", "model": options.model, "drafter": options.drafter and Path(options.drafter).name,
              "dtype": options.dtype, "block_size": block_size(options), "max_tokens": options.max_tokens,
              "limit": options.limit, "adapts": options.block_size is None,
              "rounds": options.rounds, "cpu": build_info()["cpu"], "threads": options.threads, "commit": commit(),
              "versions": {}, "command": command(options)}
    found = Measurement(options, header, {}, Rows(), {})
    try:
        found.start(order, *forms(options.model, options.drafter, {turn.peer.reads for turn in order}),
                    list(tokenizer.stop_ids), units)
        for _ in chain(found.measure(units), found.watch(units)):
            keep(options.json, found.result())
    finally:
        found.close()
    keep(options.json, found.result())
    return found.result()


def keep(file: Path | None, result: dict) -> None:
    if file is not None:
        write_json(file, result)


def show(result: dict) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("task", "peer", "mode", "threads", "concurrency", "prompts", "tokens", "acceptance", "tokens/s",
                   "rounds", "ms a step", "same as our baseline"):
        table.add_column(column, justify="left" if column in ("task", "peer", "mode") else "right")
    for r in result["rows"]:
        same = "" if r["same_as_our_baseline"] is None else f"{r['same_as_our_baseline']} of {r['prompts']}"
        table.add_row(r["task"], r["peer"], r["mode"], str(r["threads"]), str(r["concurrency"]), str(r["prompts"]),
                      str(r["tokens"]), f"{r['acceptance_length']:.2f}", f"{r['tokens_per_s']:.1f}",
                      f"{r['slowest']:.1f}-{r['fastest']:.1f}",
                      "" if r["ms_per_step"] is None else f"{r['ms_per_step']:.1f}", same)
    wide = Console(highlight=False, width=max(OUT.width, WIDE))
    wide.print(table)
    if result["parts"]:
        wide.print(parts_table(result["parts"]))
    for who, why in result["missing"].items():
        OUT.print(f"missing: {who}: {why}", markup=False)


def parts_table(parts: list[dict]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("peer", "mode", "threads", "steps", *(f"{name}, ms" for name in STEP_PARTS), ""):
        table.add_column(column, justify="left" if column in ("peer", "mode", "") else "right")
    for p in parts:
        ms = ("" if p[f"{name}_ms"] is None else f"{p[f'{name}_ms']:.2f}" for name in STEP_PARTS)
        table.add_row(p["peer"], p["mode"], str(p["threads"]), str(p["steps"]), *ms, p["whole"])
    return table


def parsed() -> argparse.Namespace:
    def chosen(text):
        unknown = set(text.split(",")) - {*NAMES, "all"}
        if unknown:
            raise argparse.ArgumentTypeError(f"must be of {','.join(NAMES)}; got {','.join(sorted(unknown))}")
        return NAMES if "all" in text.split(",") else [n for n in NAMES if n in ("ours", *text.split(","))]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help='JSON lines: {"task", "id", "turns"}')
    parser.add_argument("--drafter", default="auto", help="a drafter's directory; auto: the installed one for the "
                                                        "model; none: baseline decoding only")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--limit", type=int, help="the first N prompts of each file, at concurrency 1")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32],
                        help="values above 1 apply to peers that batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-size", type=int, help="tokens per block; by default the drafter's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=chosen, default=NAMES, metavar="NAME,...",
                        help=f"of {','.join(NAMES)}; ours is always included")
    parser.add_argument("--dtype", choices=[BFLOAT16, "float32"], default=BFLOAT16,
                        help="float32 has no near ties, so outputs and acceptance can be compared; it is slow")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one peer's loading or one answer")
    parser.add_argument("--json", type=output, help="written after every answer, so that an interrupted run keeps its "
                                                  "rows; default bench/results/<device>/peers.json, "
                                                  "or peers-float32.json")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    draft = drafter_of(options.model, options.drafter)
    options.drafter = None if draft == "none" else draft
    if options.json is None and not options.no_write:
        options.json = results_folder() / ("peers.json" if options.dtype == BFLOAT16 else "peers-float32.json")
    return options


def main() -> None:
    result = measure(parsed())
    show(result)
    sys.exit(0 if result["rows"] else 1)
