"""Turns replies into rows: one per peer, mode, task and concurrency, and one over all tasks."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.peers.job import BASELINE, DFLASH, Reply

ALL, OURS = "all", "ours"
STEP_PARTS = "draft", "verify", "rest", "step"


@dataclass(frozen=True)
class Key:
    peer: str
    mode: str
    threads: int
    concurrency: int
    task: str

    @property
    def turn(self) -> tuple[str, str, int]:
        return self.peer, self.mode, self.threads


@dataclass
class Round:
    """The result of one round, for one peer and task, or for several tasks added up."""

    reply: Reply
    prompt_seconds: float

    def __add__(self, other: "Round") -> "Round":
        a, b = self.reply, other.reply
        tokens = None if a.tokens is None or b.tokens is None else a.tokens + b.tokens
        return Round(Reply(a.seconds + b.seconds, a.counts + b.counts, tokens, a.steps + b.steps,
                           added([a.accepted, b.accepted])), self.prompt_seconds + other.prompt_seconds)

    @property
    def rate(self) -> float:
        return sum(self.reply.counts) / self.reply.seconds

    @property
    def steps(self) -> int:
        return sum(self.reply.steps)

    @property
    def decode_seconds(self) -> float:
        return self.reply.seconds - self.prompt_seconds

    @property
    def decoded(self) -> int:
        """The tokens from steps: the first token of an answer comes from its prefill."""
        return sum(self.reply.counts) - len(self.reply.counts)


@dataclass
class Rows:
    """All rounds of every key, ordered by first appearance."""

    found: dict[Key, list[Round]] = field(default_factory=dict)

    def add(self, key: Key, reply: Reply, prompt_seconds: float) -> None:
        self.found.setdefault(key, []).append(Round(reply, prompt_seconds))

    def rows(self) -> list[dict]:
        """By task, then over all tasks for the peers that ran all; low concurrency first."""
        rows = []
        for concurrency in sorted({key.concurrency for key in self.found}):
            found = {key: rounds for key, rounds in self.found.items() if key.concurrency == concurrency}
            tasks = list(dict.fromkeys(key.task for key in found))
            found |= whole(found, tasks)
            turns = list(dict.fromkeys(key.turn for key in found))
            found = dict(sorted(found.items(), key=lambda item: turns.index(item[0].turn)))  # as in the first task
            for task in [*tasks, *([] if ALL in tasks else [ALL])]:
                baseline = next((rounds[0].reply.tokens for key, rounds in found.items()
                              if (key.task, key.peer, key.mode) == (task, OURS, BASELINE)), None)
                drafted = next((rounds[0].reply for key, rounds in found.items()
                                if (key.task, key.peer, key.mode) == (task, OURS, DFLASH)), None)
                rows += [row(key, rounds, baseline) | {"same_text": where_same(rounds[0].reply, drafted)}
                         for key, rounds in found.items() if key.task == task]
        return rows


def whole(found: dict[Key, list[Round]], tasks: list[str]) -> dict[Key, list[Round]]:
    """The rounds that have all tasks, with their tasks added up."""
    made = {}
    for key in found:
        of = [found.get(Key(key.peer, key.mode, key.threads, key.concurrency, task)) for task in tasks]
        if len(tasks) > 1 and all(of):
            made[Key(key.peer, key.mode, key.threads, key.concurrency, ALL)] = [
                sum(rounds[1:], rounds[0]) for rounds in zip(*of, strict=False)]
    return made


def row(key: Key, rounds: list[Round], baseline: list[list[int]] | None) -> dict:
    """A row. Rates are medians over the rounds, with the slowest and the fastest round.

    acceptance_length: tokens per step. The last step of an answer is cut at the limit, for every peer alike, because
        tokens are counted.
    by_position: the share of steps that accepted the draft at position 1, 2, ...
    decode_tokens_per_s, ms_per_step: without the prefills and their one token each. A step of baseline decoding is one
        token.
    """
    rates, reply = [r.rate for r in rounds], rounds[0].reply
    steps, decoded = sum(r.steps for r in rounds), sum(r.decoded for r in rounds)
    same = None
    if baseline is not None and reply.tokens is not None:
        same = sum(a == b for a, b in zip(reply.tokens, baseline, strict=True))
    one = key.concurrency == 1  # else prefills of some requests run between the steps of others
    passes = [r.steps or r.decoded for r in rounds]
    timed = [(r, n) for r, n in zip(rounds, passes, strict=True) if one and n and r.decode_seconds > 0]
    return {
        "peer": key.peer, "task": key.task, "mode": key.mode, "threads": key.threads, "concurrency": key.concurrency,
        "rounds": len(rounds), "prompts": len(reply.counts), "tokens": sum(reply.counts),
        "tokens_per_s": round(statistics.median(rates), 2), "slowest": round(min(rates), 2),
        "fastest": round(max(rates), 2),
        "decode_tokens_per_s": middle((r.decoded / r.decode_seconds for r, _ in timed), 2),
        "ms_per_step": middle((1e3 * r.decode_seconds / n for r, n in timed), 3),
        "prompt_seconds": middle((r.prompt_seconds for r, _ in timed), 3),
        "acceptance_length": round(decoded / steps, 4) if steps else 1.0,
        "by_position": [round(n / steps, 4) for n in added(r.reply.accepted for r in rounds)] if steps else [],
        "steps": steps // len(rounds), "same_as_our_baseline": same,
        "same_in_every_round": reply.tokens and all(r.reply.tokens == reply.tokens for r in rounds),
    }


def parts_row(turn: tuple[str, str, int], replies: list[Reply]) -> dict:
    """Medians over the steps of all answers, in ms: of the step and its parts. "rest" is the step without the passes.
    whole: the reason that it could not be split."""
    peer, mode, threads = turn
    steps = [with_rest(step) for reply in replies for step in reply.parts]
    known = {name: middle((1e3 * step[name] for step in steps if name in step), 3) for name in STEP_PARTS}
    return {"peer": peer, "mode": mode, "threads": threads, "prompts": len(replies), "steps": len(steps),
            **{f"{name}_ms": ms for name, ms in known.items()},
            "whole": "; ".join(dict.fromkeys(reply.whole for reply in replies if reply.whole))}


def with_rest(step: dict[str, float]) -> dict[str, float]:
    passes = [seconds for name, seconds in step.items() if name != "step"]
    return step | {"rest": step["step"] - sum(passes)} if passes else step


def where_same(reply: Reply, ours: Reply | None) -> dict | None:
    """The acceptance lengths of a peer and of ours over the prompts with identical output. Where a near tie makes
    outputs differ, the drafts are for other text, and acceptance differs for that reason alone."""
    if ours is None or reply.tokens is None or not len(reply.steps) == len(ours.steps) == len(ours.counts):
        return None
    same = [i for i, tokens in enumerate(reply.tokens) if tokens == ours.tokens[i] and reply.steps[i] and ours.steps[i]]
    decoded = sum(reply.counts[i] - 1 for i in same)
    return {"prompts": len(same), **({} if not same else {
        "acceptance_length": round(decoded / sum(reply.steps[i] for i in same), 4),
        "ours": round(decoded / sum(ours.steps[i] for i in same), 4)})}


def middle(values: Iterable[float], digits: int) -> float | None:
    values = list(values)
    return round(statistics.median(values), digits) if values else None


def added(lists: Iterable[list[int]]) -> list[int]:
    """Sums by position. A shorter list, of an answer without a step, counts as zeros."""
    out: list[int] = []
    for values in lists:
        out += [0] * (len(values) - len(out))
        for i, value in enumerate(values):
            out[i] += value
    return out
