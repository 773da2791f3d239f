"""Questions to a peer and its replies: JSON lines over a socket, for as long as the driver keeps it open.

It uses only the standard library, because every peer's environment runs it.
"""

import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from bench.peers.passes import Passes

BASELINE, DFLASH = "baseline", "dflash"


@dataclass
class Job:
    """The setup of a peer. draft: None in baseline mode. longest: tokens of the longest prompt and its answer.
    concurrency: the most concurrent requests. adapts: our loop chooses how many tokens of a block it verifies."""

    mode: str
    model: str
    draft: str | None
    block_size: int
    longest: int
    concurrency: int
    threads: int
    stop_ids: list[int]
    dtype: str
    weights: str = "model"
    adapts: bool = True


@dataclass
class Question:
    """prompts: token ids, the same for every peer, so that none uses its own template; `concurrency` of them at a time.
    watched: steps are timed by part, for one prompt. Watched questions are a peer's last, because it stays watched."""

    prompts: list[list[int]]
    max_tokens: int
    concurrency: int = 1
    watched: bool = False


@dataclass
class Reply:
    """The reply to a question.

    seconds: for all prompts.
    counts: new tokens of each prompt, including the stop token.
    tokens: the ids, or None from a peer that does not report them.
    steps: target passes that verified drafts, for each prompt, or for all prompts if the peer reports no more. Empty in
        baseline mode.
    accepted: the number of steps in which the draft at position 1, 2, ... of the block was accepted. Empty in baseline
        mode.
    parts: of a watched question, the seconds of each step: "step" in all, and "draft" and "verify" where they can be
        separated.
    whole: the reason that they cannot.
    """

    seconds: float
    counts: list[int]
    tokens: list[list[int]] | None = None
    steps: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    whole: str = ""


Answering = Callable[[Question], Reply]
Watch = Callable[[Passes], None]


def accepted_drafts(commits: list[int], block_size: int) -> list[int]:
    """Converts the tokens that each step committed, including its own last one, to Reply.accepted."""
    return [sum(n > i for n in commits) for i in range(1, block_size)]


def serve(load: Callable[[Job], tuple[Answering, dict[str, str], Watch | None]]) -> None:
    """The main function of a peer, called with the number of its end of the socket.

    load(job) returns a function that answers, versions, and a function that starts timing the decoder's passes. The
    last raises NotImplementedError with the reason where it cannot time them; None means that the answers contain the
    times. An error ends the peer, and the last line of its log has the reason.
    """
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)  # a child of ours must not keep the driver waiting when we are gone
    lines = end.makefile("rw", encoding="utf-8")

    def say(value):
        lines.write(json.dumps(value) + "\n")
        lines.flush()

    answering, versions, watch = load(Job(**json.loads(lines.readline())))
    say(versions)
    watched = None if watch is None else Watched(answering, watch)
    for line in lines:
        asked = Question(**json.loads(line))
        say(asdict((watched if asked.watched and watched else answering)(asked)))


class Watched:
    """Answers as before, with the steps by part."""

    def __init__(self, answering: Answering, watch: Watch, clock: Callable[[], float] = time.perf_counter):
        self.answering, self.watch, self.clock, self.passes, self.whole = answering, watch, clock, None, ""

    def __call__(self, asked: Question) -> Reply:
        if self.passes is None:
            self.passes = Passes(self.clock)
            try:
                self.watch(self.passes)
            except NotImplementedError as error:
                self.whole = str(error)
        self.passes.prompt()
        reply = self.answering(asked)
        reply.parts, reply.whole = self.passes.taken(), self.whole
        return reply
