"""Training conversations that the target writes: prompts at temperature 1, answers mostly greedy.

A prompt is the target's own continuation of an empty user turn, the idea of Magpie (arXiv 2406.08464). Openings steer a
share of them to code, mathematics and everyday tasks, and some follow an answer as its second turn. A conversation is a
JSON object of source, prompt, answer, temperature, finish and tokens (of the answer). It can have the earlier turns, as
[prompt, answer] pairs, in `before`, the chat template's variables in `template`, and in `ids` the answer's tokens, its
end included, where its text has others: of special tokens, or cut inside a character.
"""

import gzip
import json
import random
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dflash_decode import Decoder, Request, SamplingParams, Session
from dflash_decode.checkpoint.tokenizer import Tokenizer

OPENINGS = {
    "open": ("",),
    "code": ("Write a Python function", "Write a Python function that", "Implement a function", "Write a program that",
             "Complete this Python function.\n```python\ndef ",
             "Complete this Python function.\n```python\nfrom typing import List\n\n\ndef ",
             "Complete the following Python function:\n```python\ndef ", "What does this Python code do?\n```python\n",
             "Given a list of integers,", "Given a string,", "Write code to", "Fix this Python function"),
    "mathematics": ("What is the value of", "Solve for $x$:", "Find the", "Let $", "Compute", "How many", "If $",
                    "Simplify", "Evaluate", "What is the sum", "A rectangle", "What is the probability", "Determine",
                    "The function $f(x)", "Suppose", "Find all", "In triangle"),
    "everyday": ("Write a", "Explain", "Describe", "Imagine you are", "Compare", "Draft an email", "What are", "How do",
                 "Why", "Summarize", "Given the following", "Can you", "Suggest", "I have", "Who", "Act as",
                 "Pretend you are"),
}
SHARES = {"open": 0.2, "code": 0.3, "mathematics": 0.3, "everyday": 0.2}
ROOM = 512  # tokens of a conversation before its answer
ANSWER = 256  # tokens of an answer
CONTEXT = ROOM + ANSWER
PROMPT = 128  # tokens of a prompt that the target writes


def read_text(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")


def read_jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(file).split("\n") if line]


def messages_of(prompt: str, before: Iterable[tuple[str, str]] = ()) -> list[dict]:
    turns = [text for pair in before for text in pair] + [prompt]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def chat_ids(tokenizer: Tokenizer, prompt: str, before: Iterable[tuple[str, str]] = (),
             template: Mapping[str, Any] | None = None) -> list[int]:
    """The ids of a conversation up to the start of the answer to `prompt`. template: variables of the chat template."""
    return tokenizer.encode(tokenizer.apply_chat_template(messages_of(prompt, before), **template or {}))


def coded(tokenizer: Tokenizer, row: dict) -> tuple[list[int], int]:
    """The ids of a conversation with its answer, and where the answer begins."""
    prompt = chat_ids(tokenizer, row["prompt"], row.get("before", ()), row.get("template"))
    answer = row.get("ids") or tokenizer.encode(row["answer"]) + ending(tokenizer, row["finish"])
    return prompt + answer, len(prompt)


def ending(tokenizer: Tokenizer, finish: str) -> list[int]:
    return list(tokenizer.stop_ids[:1]) * (finish == "stop")


def open_turn(tokenizer: Tokenizer, before: Iterable[tuple[str, str]], opening: str,
              template: Mapping[str, Any] | None = None) -> list[int]:
    """The ids of a conversation up to the user's next turn, which begins with `opening`."""
    text = tokenizer.apply_chat_template(messages_of("\0", before), **template or {})
    return tokenizer.encode(text[:text.rindex("\0")] + opening)


@dataclass(frozen=True)
class Turn:
    """A request in progress: the answer to `prompt`, or (answers False) the prompt that begins with it."""

    source: str
    prompt: str
    before: tuple[tuple[str, str], ...] = ()
    answers: bool = True
    temperature: float = 1.0


class Writer:
    """Prompts and answers in one stream of requests.

    given: (source, prompt) pairs to answer first. done: prompts that are never asked (again). own: whether the target
    writes prompts when those given are used up. budget: the most tokens of an answer. sampled, follow: the shares of
    answers at temperature 0.8, and of finished answers to which the target writes a second prompt. skipped: how many
    prompts were too long.
    """

    def __init__(self, session: Session, given: Iterable[tuple[str, str]], done: Collection[str], *, concurrency: int,
                 seed: int, own: bool = True, budget: int = ANSWER, sampled: float = 0.1, follow: float = 0.15,
                 template: Mapping[str, Any] | None = None):
        self.tokenizer, self.own, self.budget, self.sampled, self.follow, self.template = (
            session.tokenizer, own, budget, sampled, follow, dict(template or {}))
        self.context, self.skipped = ROOM + budget, 0
        self.decoder = Decoder(session.target, max_batch=concurrency, max_context=self.context)
        self.given, self.done, self.draw = iter(given), set(done), random.Random(seed)
        self.ready: deque[Turn] = deque()
        self.turns: dict[int, Turn] = {}

    def conversations(self) -> Iterator[dict]:
        """Conversations as they end, without end if `own`."""
        answers: dict[int, list[int]] = {}
        for event in self.decoder.stream(self._requests()):
            answer = answers.setdefault(event.id, [])
            answer += event.tokens
            if event.finish is None:
                continue
            del answers[event.id]
            turn = self.turns.pop(event.id)
            if event.finish == "error":
                raise ValueError(f"{turn.source}: {event.error}")
            whole = list(answer)
            if event.finish == "stop":
                answer.pop()
            text = self.tokenizer.decode(answer)
            if not turn.answers:
                self._ask((turn.prompt + text).strip(), turn, event.finish, len(answer))
                continue
            if event.finish == "stop" and not turn.before and self.draw.random() < self.follow:
                opening = self.draw.choice(("", "Can you", "Now", "What", "How", "Why", "Rewrite", "Explain"))
                self.ready.append(Turn(f"{turn.source}, next", opening, ((turn.prompt, text),), False))
            row = {"source": turn.source, "prompt": turn.prompt, "answer": text, "temperature": turn.temperature,
                   "finish": event.finish, "tokens": len(answer)}
            if whole != self.tokenizer.encode(text) + ending(self.tokenizer, event.finish):
                row["ids"] = whole
            yield row | ({"before": turn.before} if turn.before else {}) | (
                {"template": self.template} if self.template else {})

    def _ask(self, prompt: str, turn: Turn, finish: str, tokens: int) -> None:
        """Queues a prompt that the target wrote, if it ended by itself and is new."""
        if finish == "stop" and tokens >= 4 and prompt not in self.done:
            self.done.add(prompt)
            self.ready.append(Turn(turn.source, prompt, turn.before))

    def _next(self) -> Turn | None:
        if self.ready:
            return self.ready.popleft()
        for source, prompt in self.given:
            if prompt not in self.done:
                self.done.add(prompt)
                return Turn(source, prompt)
        if not self.own:
            return None
        kind = self.draw.choices(list(SHARES), list(SHARES.values()))[0]
        return Turn(kind, self.draw.choice(OPENINGS[kind]), answers=False)

    def _requests(self) -> Iterator[Request | None]:
        number = 0
        while (turn := self._next()) or self.turns:
            if turn is None:  # an answer in progress can still be given a second prompt
                yield None
                continue
            if turn.answers:
                ids, budget = chat_ids(self.tokenizer, turn.prompt, turn.before, self.template), self.budget
                turn = replace(turn, temperature=0.8 if self.draw.random() < self.sampled else 0.0)
            else:
                ids, budget = open_turn(self.tokenizer, turn.before, turn.prompt, self.template), PROMPT
            if len(ids) + budget > self.context:
                self.skipped += 1
                continue
            self.turns[number] = turn
            yield Request(number, ids, budget, self.tokenizer.stop_ids,
                          SamplingParams(turn.temperature, seed=self.draw.randrange(2**31)))
            number += 1
