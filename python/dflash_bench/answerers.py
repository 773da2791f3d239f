"""The two answerers of the protocol: our loop and a server."""

import queue
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dflash_decode.checkpoint import CheckpointError
from dflash_decode.loop import Decoder
from dflash_decode.requests import Event, Request
from dflash_decode.sampling import GREEDY
from dflash_decode.session import Session

from .chat import ChatServer, Dropped, Reply
from .decode import Prompt
from .metrics import Drafting
from .protocol import Answered, Answers, Turn

WARM_UP_TOKENS, WARM_UP = 16, "Count to ten."


@dataclass
class _Talk:
    """A conversation: its messages, and the answer in progress."""

    prompt: Prompt
    messages: list[dict] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    began: float = 0.0
    prompt_tokens: int = 0
    retries: int = 0

    def ask(self) -> list[dict]:
        """The messages up to the user's next one."""
        self.messages.append({"role": "user", "content": self.prompt.turns[len(self.turns)]})
        self.began = time.perf_counter()
        return self.messages

    def answer(self, text: str, turn: Turn) -> Answered | None:
        """Returns the conversation if this was its last turn."""
        self.messages.append({"role": "assistant", "content": text})
        self.turns.append(turn)
        over = len(self.turns) == len(self.prompt.turns)
        return Answered(self.prompt, tuple(self.turns), self.retries) if over else None


class OurLoop:
    """The package's own decoder. It warms up before the clock runs, as a server does before its first request."""

    def __init__(self, session: Session, max_tokens: int):
        self.session, self.max_tokens = session, max_tokens
        self.about = {"model": session.model, "drafter": session.drafter_name, "block_size": session.block_size,
                      "dtype": str(session.target.dtype).removeprefix("torch."),
                      "weights": session.weights,
                      "drafter_int8": session.drafter is not None and session.drafter.int8,
                      "device": session.target.device.type, "max_tokens": max_tokens}

    def counters(self) -> Drafting | None:
        return None  # every step is known

    def answer(self, prompts: Sequence[Prompt], concurrency: int) -> Answers:
        if not self.session.tokenizer.chat_template and any(len(p.turns) > 1 for p in prompts):
            raise CheckpointError(f"{self.session.model}: expected a chat template, for prompts of several turns; "
                                  "got none")
        rooms = [self._room(prompt) for prompt in prompts]
        decoder = Decoder(self.session.target, self.session.drafter,
                          block_size=self.session.block_size if self.session.drafter else None,
                          max_batch=min(concurrency, len(prompts)), max_context=max(rooms))
        decoder.warm_up(samplings=[GREEDY])
        return self._stream(decoder, prompts)

    def _room(self, prompt: Prompt) -> int:
        """The tokens that the whole conversation can use. Raises ValueError if its first message does not fit."""
        room, first = self.session.target.max_context, len(self._ids(_Talk(prompt).ask()))
        if first >= room:
            raise ValueError(f"{prompt.id}: the prompt must be shorter than the model's context of {room} tokens; "
                             f"got {first}")
        rest = [{"role": role, "content": text} for turn in prompt.turns[1:] for role, text in
                (("assistant", ""), ("user", turn))]
        whole = len(self._ids([{"role": "user", "content": prompt.turns[0]}, *rest])) if rest else first
        return min(room, whole + len(prompt.turns) * self.max_tokens)

    def _ids(self, messages: list[dict]) -> list[int]:
        tokenizer = self.session.tokenizer
        if tokenizer.chat_template:
            return tokenizer.encode(tokenizer.apply_chat_template(messages))
        return self.session.prompt_ids(messages[0]["content"])

    def _stream(self, decoder: Decoder, prompts: Sequence[Prompt]) -> Answers:
        waiting, running = deque(_Talk(p) for p in prompts), dict[Hashable, _Talk]()
        sent = 0

        def requests() -> Iterator[Request | None]:
            nonlocal sent
            while waiting or running:
                if not waiting:
                    yield None
                    continue
                talk, sent = waiting.popleft(), sent + 1
                ids, running[sent] = self._ids(talk.ask()), talk
                talk.prompt_tokens = len(ids)
                yield Request(sent, ids, self.max_tokens, self.session.tokenizer.stop_ids)

        for event in decoder.stream(requests()):
            talk = running[event.id]
            talk.tokens += event.tokens
            answered = None
            if event.finish is not None:
                del running[event.id]
                answered = self._finish(talk, event)
                if answered is None:
                    waiting.appendleft(talk)
            yield len(event.tokens), answered

    def _finish(self, talk: _Talk, event: Event) -> Answered | None:
        if event.error is not None:
            # The answers so far have filled the context: the conversation ends where it is.
            if not talk.turns:
                raise ValueError(f"{talk.prompt.id}: {event.error}")
            return Answered(talk.prompt, tuple(talk.turns))
        tokens, talk.tokens = talk.tokens, []
        return talk.answer(self.session.tokenizer.decode(tokens), Turn(
            len(tokens), round(time.perf_counter() - talk.began, 4), event.finish or "", talk.prompt_tokens,
            event.acceptance_lengths))


class Server:
    """A chat server, called from one thread per concurrent request. A dropped or temporarily refused request is sent
    again after `patience` seconds, then after twice as long, for `tries` attempts in all."""

    def __init__(self, chat: ChatServer, max_tokens: int, extra: dict, tries: int = 4, patience: float = 1.0):
        self.chat, self.max_tokens, self.tries, self.patience = chat, max_tokens, tries, patience
        self.about = {"base_url": chat.url, "model": chat.model, "max_tokens": max_tokens, "extra": extra}

    def counters(self) -> Drafting | None:
        return self.chat.metrics()

    def answer(self, prompts: Sequence[Prompt], concurrency: int) -> Answers:
        self.chat.resume()
        self.chat.chat([{"role": "user", "content": WARM_UP}], WARM_UP_TOKENS)
        return self._stream(prompts, concurrency)

    def _stream(self, prompts, concurrency) -> Answers:
        todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()
        for prompt in prompts:
            todo.put(prompt)
        workers = [threading.Thread(target=self._work, args=(todo, found, stop), daemon=True)
                   for _ in range(min(concurrency, len(prompts)))]
        try:
            for worker in workers:
                worker.start()
            done = 0
            while done < len(prompts):
                news = found.get()
                if isinstance(news, BaseException):
                    raise news
                done += news[1] is not None
                yield news
        finally:
            stop.set()
            if any(worker.is_alive() for worker in workers):
                self.chat.abort()
            for worker in workers:
                worker.join()
            self.chat.resume()

    def _work(self, todo, found, stop) -> None:
        try:
            while not stop.is_set():
                try:
                    talk = _Talk(todo.get_nowait())
                except queue.Empty:
                    return
                answered = None
                while answered is None:
                    messages = talk.ask()
                    reply = self._ask(talk, messages, stop)
                    answered = talk.answer(reply.text, Turn(
                        reply.tokens, round(time.perf_counter() - talk.began, 4), reply.finish, reply.prompt_tokens))
                    found.put((reply.tokens, answered))
        except BaseException as error:  # wakes the thread that waits for this one's results
            found.put(error)

    def _ask(self, talk: _Talk, messages: list[dict], stop: threading.Event) -> Reply:
        wait = self.patience
        for _ in range(self.tries - 1):
            try:
                return self.chat.chat(messages, self.max_tokens)
            except Dropped:
                if stop.wait(wait):
                    raise
            talk.retries, wait = talk.retries + 1, 2 * wait
        return self.chat.chat(messages, self.max_tokens)
