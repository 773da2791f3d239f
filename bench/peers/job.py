"""What a peer is asked and what it answers: one process, one JSON file in, one JSON file out.

Standard library only: every peer's environment runs it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

PLAIN, DFLASH = "plain", "dflash"
WARM_UP_TOKENS = 16


@dataclass
class Job:
    """prompts: token ids, the same for every peer, so that none uses its own template. draft: None in plain mode."""

    mode: str
    model: str
    draft: str | None
    block_size: int
    max_new_tokens: int
    threads: int
    stop_ids: list[int]
    prompts: list[list[int]]


@dataclass
class Answer:
    """tokens: with the stop token. steps: target passes that checked drafts; accepted: in how many of them the draft at
    position 1, 2, ... of the block was accepted. Both empty in plain mode."""

    tokens: list[int]
    seconds: float
    steps: int = 0
    accepted: list[int] = field(default_factory=list)


# (prompts, the most new tokens) -> answers, one prompt after the other
Answering = Callable[[list[list[int]], int], list[Answer]]


def accepted_drafts(commits: list[int], block_size: int) -> list[int]:
    """From how many tokens each step committed, its own last one included, to Answer.accepted."""
    return [sum(n > i for n in commits) for i in range(1, block_size)]


def serve(load: Callable[[Job], tuple[Answering, dict[str, str]]]) -> None:
    """The main function of a peer: load(job) gives a function that answers, and versions. What is timed comes after a
    warm-up; a pass of one new token each tells how much of the time is the prompts'."""
    question, reply = map(Path, sys.argv[1:])
    job = Job(**json.loads(question.read_text(encoding="utf-8")))
    answering, versions = load(job)
    answering(job.prompts[:1], min(WARM_UP_TOKENS, job.max_new_tokens))
    prompt_seconds = sum(answer.seconds for answer in answering(job.prompts, 1))
    answers = answering(job.prompts, job.max_new_tokens)
    reply.write_text(json.dumps({"versions": versions, "prompt_seconds": prompt_seconds,
                                 "answers": [asdict(answer) for answer in answers]}), encoding="utf-8")
