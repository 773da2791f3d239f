"""`dflash-kernels bench decode`: many prompts with speculative and baseline decoding, in one process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_decode.checkpoint import CheckpointError
from dflash_decode.cli import report
from dflash_decode.forecast import Forecast
from dflash_decode.lossless import Difference, first_difference, first_index
from dflash_decode.sampling import GREEDY, SamplingParams
from dflash_decode.session import Run, Session
from dflash_kernels.testing import use_isa

from .results import commit

PORTION = 8  # prompts for each concurrent request


@dataclass(frozen=True)
class Prompt:
    task: str
    id: str
    turns: tuple[str, ...]

    @property
    def text(self) -> str:
        """The first user message."""
        return self.turns[0]


def read_prompts(file: Path, limit: int | None = None) -> list[Prompt]:
    """The user messages of each row. A row is one JSON object per line: {"task": ..., "id": ..., "turns": [message,
    ...]}."""
    try:
        # A byte order mark is not text; and only a line feed ends a row, as a JSON string may hold other separators.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: expected a file of JSON lines; got {error}") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(prompts) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            turns = row["turns"]
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
                raise ValueError("no text")
            "".join(turns).encode()  # half a character, which JSON can hold, is no text either
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(f'{file}:{number}: expected {{"task": ..., "id": ..., "turns": [text, ...]}}; '
                                  f"got {line[:60]!r}") from None
        prompts.append(Prompt(str(row.get("task", file.stem)), str(row.get("id", number)), tuple(turns)))
    if not prompts:
        raise CheckpointError(f"{file}: expected at least one prompt; got none")
    return prompts


def bench_decode(session: Session, prompts: list[Prompt], *, concurrency: int, max_tokens: int,
                 sampling: SamplingParams = GREEDY, sample_from: str = "greedy", rule: str = "token", rounds: int = 1,
                 on_task: Callable[[str, str], None] = lambda task, what: None) -> dict:
    """Results by task and overall. A task runs in portions of a few prompts, `rounds` times and with the same seeds:
    baseline, with the drafter, with the drafter, baseline and so on, as a machine is not always as fast."""
    tasks: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.task, []).append(prompt)
    found, differences = {}, []
    for task, rows in tasks.items():
        options: dict[str, Any] = {"max_tokens": max_tokens, "concurrency": concurrency, "sampling": sampling,
                   "sample_from": sample_from, "rule": rule}
        sums, different = [], set[str]()
        portions = _portions(rows, PORTION * concurrency)
        for number, part in ((n + r, p) for r in range(rounds) for n, p in enumerate(portions)):
            ids = [session.prompt_ids(row.text) for row in part]
            runs: dict[bool, Run] = {}
            for speculative in (False, True) if number % 2 == 0 else (True, False):
                on_task(task, "with the drafter" if speculative else "baseline")
                runs[speculative] = session.run(ids, speculative=speculative, **options)
            ours, baseline = runs[True], runs[False]
            for row, asked, a, b in zip(part, ids, ours.answers, baseline.answers, strict=True):
                found_at = _difference(session, asked, b.tokens, a.tokens, sampling)
                if found_at is not None and row.id not in different:
                    different.add(row.id)
                    differences.append({"id": row.id, "token": found_at.index, "got": found_at.speculative,
                                        "baseline": found_at.baseline, "margin": found_at.margin})
            sums.append(_Sums(ours.tokens, ours.seconds, baseline.tokens, baseline.seconds, ours.steps, ours.widths,
                              ours.forecast or Forecast(), 0, 0))
        found[task] = _summed(sums)
        found[task].requests, found[task].different = len(rows), len(different)
    whole = _summed(list(found.values()))
    return {"temperature": sampling.temperature} | whole.figures(session.block_size) | {
        "tasks": {task: sums.figures(session.block_size) for task, sums in found.items()},
        "differences": differences,
    }


def _portions(rows: list[Prompt], size: int) -> list[list[Prompt]]:
    """Of about this size, and alike."""
    count = max(1, round(len(rows) / size))
    return [rows[len(rows) * i // count:len(rows) * (i + 1) // count] for i in range(count)]


def by_instruction_set(session: Session, prompts: list[Prompt], sets: list[str], concurrencies: list[int],
                       **options: Any) -> list[dict]:
    """bench_decode with each instruction set of the CPU and each concurrency."""
    found = []
    for name in sets:
        with use_isa(name):
            found += [{"isa": name, "concurrency": n} | bench_decode(session, prompts, concurrency=n, **options)
                      for n in concurrencies]
    return found


def _difference(session, prompt, baseline, ours, sampling) -> Difference | None:
    """The first difference. For sampled outputs it has no logit margin, which would mean nothing."""
    at = first_index(baseline, ours)
    if at is None or sampling.temperature == 0:
        return first_difference(session.target, prompt, baseline, ours)
    there = [text[at] if at < len(text) else None for text in (baseline, ours)]
    return Difference(at, there[0], there[1], None)


@dataclass
class _Sums:
    tokens: int
    seconds: float
    baseline_tokens: int
    baseline_seconds: float
    steps: list[int]
    widths: list[int]
    forecast: Forecast
    requests: int
    different: int

    def parts(self) -> tuple:
        return tuple(vars(self).values())

    def figures(self, width: int) -> dict:
        """forecast: what the choice of widths expected of a step, and what it brought."""
        rate, baseline = self.tokens / self.seconds, self.baseline_tokens / self.baseline_seconds
        steps = self.forecast.steps
        forecast = {"forecast": {
            "tokens_per_step": [round(t / steps, 4) for t in (self.forecast.expected_tokens, self.forecast.tokens)],
            "ms_per_step": [round(s / steps * 1e3, 4) for s in (self.forecast.expected_seconds, self.forecast.seconds)],
        }} if steps else {}
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "acceptance_length": round(sum(self.steps) / len(self.steps), 4) if self.steps else 1.0,
            "acceptance_histogram": report.counts(self.steps, width),
            "verified_rows": round(sum(self.widths) / len(self.widths), 4) if self.widths else 1.0,
            "tokens_per_s": round(rate, 2),
            "baseline_tokens_per_s": round(baseline, 2),
            "speedup": round(rate / baseline, 4),
            "identical_to_baseline": self.different == 0,
            "different_requests": self.different,
        } | forecast


def _summed(parts: list[_Sums]) -> _Sums:
    return _Sums(*(sum(values[1:], values[0]) for values in zip(*(part.parts() for part in parts), strict=True)))


def header(session: Session, **options) -> dict:
    """The machine, settings and commit of a measurement."""
    return report.header(session, **options) | {"commit": commit()}
