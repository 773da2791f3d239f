"""From answers to rows: one for each peer, mode and task, and one for all tasks together."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from job import PLAIN

ALL, OURS = "all", "ours"


@dataclass
class Sums:
    """same: how many answers are those of our plain decoding; None where that did not run."""

    peer: str
    mode: str
    threads: int
    task: str
    prompts: int
    tokens: int
    seconds: float
    prompt_seconds: float
    steps: int = 0
    accepted: list[int] = field(default_factory=list)
    same: int | None = None
    answers: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, peer: str, mode: str, threads: int, task: str, reply: dict) -> "Sums":
        """reply: what job.serve wrote."""
        found = reply["answers"]
        answers = [a["tokens"] for a in found]
        return cls(peer, mode, threads, task, len(found), sum(map(len, answers)), sum(a["seconds"] for a in found),
                   reply["prompt_seconds"], sum(a["steps"] for a in found), _added(a["accepted"] for a in found),
                   answers=answers)

    def row(self) -> dict:
        """acceptance_length: tokens that a step commits. by_position: in which share of the steps the draft at
        position 1, 2, ... was accepted. decode_tokens_per_s: without the prompts' passes and their one token each."""
        decoding, rest = self.tokens - self.prompts, self.seconds - self.prompt_seconds
        return {
            "peer": self.peer, "task": self.task, "mode": self.mode, "threads": self.threads, "prompts": self.prompts,
            "tokens": self.tokens, "seconds": round(self.seconds, 3), "tokens_per_s": _rate(self.tokens, self.seconds),
            "prompt_seconds": round(self.prompt_seconds, 3), "decode_tokens_per_s": _rate(decoding, rest),
            "acceptance_length": round(1 + sum(self.accepted) / self.steps, 4) if self.steps else 1.0,
            "by_position": [round(n / self.steps, 4) for n in self.accepted] if self.steps else [],
            "steps": self.steps, "same_as_our_plain": self.same,
        }

    @property
    def key(self) -> tuple[str, str, int]:
        return self.peer, self.mode, self.threads


def rows(found: list[Sums]) -> list[dict]:
    """Task by task, then all together for whoever did every task."""
    tasks = list(dict.fromkeys(s.task for s in found))
    plain = {s.task: s.answers for s in found if (s.peer, s.mode) == (OURS, PLAIN)}
    groups: dict[tuple, list[Sums]] = {}
    for sums in found:
        if sums.task in plain:
            sums.same = sum(a == b for a, b in zip(sums.answers, plain[sums.task], strict=True))
        groups.setdefault(sums.key, []).append(sums)
    # Sorting is stable and dictionaries keep their order: peers stand in that of the first task, whatever the others'.
    by_task = sorted((s for group in groups.values() for s in group), key=lambda s: tasks.index(s.task))
    whole = [together(group) for group in groups.values() if len(group) == len(tasks) > 1]
    return [sums.row() for sums in (*by_task, *whole)]


def together(group: list[Sums]) -> Sums:
    def total(name):
        return sum(getattr(s, name) for s in group)

    same = None if any(s.same is None for s in group) else total("same")
    return Sums(*group[0].key, ALL, total("prompts"), total("tokens"), total("seconds"), total("prompt_seconds"),
                total("steps"), _added(s.accepted for s in group), same)


def _added(lists: Iterable[list[int]]) -> list[int]:
    """Sums by position; a shorter list, of an answer without a step, counts as zeros."""
    out: list[int] = []
    for values in lists:
        out += [0] * (len(values) - len(out))
        for i, value in enumerate(values):
            out[i] += value
    return out


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if tokens > 0 and seconds > 0 else None
