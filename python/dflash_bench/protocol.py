"""The protocol of the DFlash model cards: throughput and acceptance length by task and concurrency, greedy.

Our loop and a server are both an Answerer. Every finished prompt is written immediately as one JSON line to the
journal, so an interrupted measurement keeps its results and the same command continues it.
"""

import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from dflash_decode.checkpoint import CheckpointError

from .decode import Prompt
from .metrics import Drafting

# Columns of the card's tables, in its order.
TASKS = {"math500": "Math500", "gsm8k": "GSM8K", "humaneval": "HumanEval", "mt_bench": "MT-Bench"}
# The card of z-lab/MiniMax-M2.7-DFlash: 4 x B200, SGLang, tensor parallel 4, block 8, greedy, 4,096 new tokens at most,
# thinking on, 128 prompts at concurrency 1 and 1,024 at 32. What is not here was not to be had.
CARD_THROUGHPUT = {1: {"math500": 331.12, "gsm8k": 304.07, "humaneval": 333.44},
                   32: {"math500": 4422.52, "gsm8k": 4202.09, "humaneval": 4394.23}}
CARD_ACCEPTANCE = {1: {"math500": 3.561, "gsm8k": 3.481, "humaneval": 3.610, "mt_bench": 3.550}, 32: {"math500": 3.66}}
NOT_REPORTED = "not reported"


@dataclass(frozen=True)
class Turn:
    """One answer. tokens: generated tokens. steps: tokens committed by each step, where known. finish: stop, length, or
    the server's word."""

    tokens: int
    seconds: float
    finish: str
    prompt_tokens: int | None = None
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Answered:
    """A prompt with all its turns. retries: requests that were sent again."""

    prompt: Prompt
    turns: tuple[Turn, ...]
    retries: int = 0


# Closing it stops what it asks for.
Answers: TypeAlias = Generator[tuple[int, Answered | None], None, None]


class Answerer(Protocol):
    """Answers prompts.

    about: the settings that two runs of one measurement must share. answer() yields (new tokens, a finished prompt or
    None) and stops cleanly when it is closed. counters() returns the server's counters so far.
    """

    about: dict

    def answer(self, prompts: Sequence[Prompt], concurrency: int) -> Answers: ...

    def counters(self) -> Drafting | None: ...


class Journal:
    """The lines of a measurement: its description, then finished prompts and each run's counters as they arrive.

    A run is a period without interruption. A prompt's line records its run's progress: `at` seconds and `so_far` tokens
    of all prompts, finished or not. An incomplete last line is dropped.
    """

    def __init__(self, file: Path, about: dict):
        """Raises CheckpointError if the file is no journal, or that of another measurement."""
        self.file = file
        found = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        if found and not found[-1].endswith(b"\n"):
            found.pop()
        self.lines = [self._parse(number, line) for number, line in enumerate(found, 1)]
        if self.lines:
            _same_measurement(file, self.lines.pop(0)["about"], json.loads(json.dumps(about)))
        with file.open("ab") as out:
            out.truncate(sum(map(len, found)))
        if not found:
            self._write({"about": about})

    def _parse(self, number: int, line: bytes) -> dict:
        try:
            row = json.loads(line)
            if ({"about"} if number == 1 else {"task", "concurrency", "run"}) <= row.keys():
                return row
        except (ValueError, AttributeError):
            pass
        raise CheckpointError(f"{self.file}:{number}: expected a journal of `bench protocol`; got {line[:60]!r}")

    def _write(self, line: dict) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def append(self, line: dict) -> None:
        self._write(line)
        self.lines.append(line)

    def of(self, task: str, concurrency: int) -> list[dict]:
        return [row for row in self.lines if (row["task"], row["concurrency"]) == (task, concurrency)]

    def done(self, task: str, concurrency: int) -> set[str]:
        return {row["id"] for row in self.of(task, concurrency) if "id" in row}


def _same_measurement(file: Path, before: dict, now: dict) -> None:
    other = [f"{name} {before.get(name)!r} there, {now.get(name)!r} here" for name in {**before, **now}
             if before.get(name) != now.get(name)]
    if other:
        raise CheckpointError(f"{file}: expected the journal of this measurement; got that of another: "
                              f"{'; '.join(other)}. Name another --journal, or remove it to measure again")


def by_task(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Tasks in the card's order, then others. Raises CheckpointError for a repeated id."""
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        rows = found.setdefault(prompt.task, [])
        if any(row.id == prompt.id for row in rows):
            raise CheckpointError(f"{prompt.task}: expected every prompt's id once; got {prompt.id!r} twice")
        rows.append(prompt)
    order = [*TASKS, *found]
    return {task: found[task] for task in sorted(found, key=order.index)}


@dataclass
class Stage:
    """One task at one concurrency. done: prompts with all their turns."""

    task: str
    concurrency: int
    total: int
    done: int
    tokens: int = 0
    seconds: float = 0.0


def measure(answerer: Answerer, prompts: Sequence[Prompt], concurrencies: Sequence[int], journal: Journal,
            on_change: Callable[[Stage], None] = lambda stage: None) -> None:
    """Decodes the prompts that the journal lacks, task by task and one concurrency after another."""
    tasks = by_task(prompts)
    for concurrency in concurrencies:
        for task, rows in tasks.items():
            done = journal.done(task, concurrency)
            left = [row for row in rows if row.id not in done]
            stage = Stage(task, concurrency, len(rows), len(rows) - len(left))
            on_change(stage)
            if left:
                _run(answerer, left, stage, journal, on_change)


def _run(answerer: Answerer, left: list[Prompt], stage: Stage, journal: Journal, on_change) -> None:
    where: dict[str, Any] = {"task": stage.task, "concurrency": stage.concurrency}
    run = 1 + max((row["run"] for row in journal.of(**where)), default=0)
    answers = answerer.answer(left, stage.concurrency)
    before, began = answerer.counters(), time.perf_counter()
    try:
        for tokens, answered in answers:
            stage.tokens, stage.seconds = stage.tokens + tokens, time.perf_counter() - began
            if answered is not None:
                stage.done += 1
                journal.append(where | {"run": run, "id": answered.prompt.id, "at": round(stage.seconds, 4),
                                        "so_far": stage.tokens, "retries": answered.retries,
                                        "turns": [asdict(turn) for turn in answered.turns]})
            on_change(stage)
    finally:
        answers.close()
        after = answerer.counters() if before is not None else None
        if before is not None and after is not None:
            journal.append(where | {"run": run, "counters": asdict(after - before)})


def figures(journal: Journal, prompts: Sequence[Prompt], concurrencies: Sequence[int]) -> list[dict]:
    """A row for each concurrency and task with a finished prompt."""
    found = []
    for concurrency in concurrencies:
        for task, rows in by_task(prompts).items():
            lines = journal.of(task, concurrency)
            if any("id" in row for row in lines):
                found.append({"task": task, "concurrency": concurrency, "of": len(rows), **_figures(lines)})
    return found


def _figures(lines: list[dict]) -> dict:
    answered = [row for row in lines if "id" in row]
    turns = [turn for row in answered for turn in row["turns"]]
    last = {row["run"]: row for row in answered}  # a run's last line knows all its tokens and seconds
    tokens, seconds = (sum(row[key] for row in last.values()) for key in ("so_far", "at"))
    return {"prompts": len(answered), "turns": len(turns), "tokens": sum(turn["tokens"] for turn in turns),
            "cut_at_the_limit": sum(turn["finish"] == "length" for turn in turns), "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds, 2) if seconds else None, "runs": len(last),
            "retries": sum(row["retries"] for row in answered), **_acceptance(lines, turns)}


def _acceptance(lines: list[dict], turns: list[dict]) -> dict:
    if all(turn["steps"] is not None for turn in turns):
        steps = [n for turn in turns for n in turn["steps"]]
        return {"acceptance_length": round(sum(steps) / len(steps), 4) if steps else 1.0, "acceptance_from": "steps",
                "acceptance_histogram": [steps.count(n) for n in range(1, max(steps, default=0) + 1)]}
    counted = [Drafting(**row["counters"]) for row in lines if "counters" in row]
    whole = sum(counted[1:], counted[0]) if counted else None
    if whole is None or whole.length is None:
        return {"acceptance_length": None, "acceptance_from": NOT_REPORTED}
    return {"acceptance_length": round(whole.length, 4), "acceptance_from": whole.source,
            "accepted_by_position": [round(n / whole.drafts, 4) for n in whole.by_position] if whole.drafts else []}
