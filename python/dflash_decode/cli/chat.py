"""`dflash-kernels chat`: a conversation, for people line by line and for programs in JSON lines."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..llm.api import LLM
from ..llm.outputs import Completion, GenerationError
from ..llm.params import GenerationParams
from . import report
from .conversation import check_message
from .streams import UsageError

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


class Chat:
    """A conversation with its history.

    first: the message that every conversation begins with. params: a seed is of the first answer; each further answer
        adds one.
    """

    def __init__(self, llm: LLM, first: dict[str, Any] | None, params: GenerationParams, names: dict[str, Any]):
        self.llm, self.params, self.names = llm, params, names
        self.first = [] if first is None else [first]
        self.history: list[dict[str, Any]] = []
        self.answers = 0

    def clear(self) -> None:
        self.history = []

    def say(self, message: dict[str, Any], write: Callable[[str], None], person: bool) -> Completion:
        """The answer to one more message, written as it arrives. Both enter the history. An interrupt of a person ends
        the answer where it is."""
        seed = None if self.params.seed is None else (self.params.seed + self.answers) % 2**63
        asked = [*self.first, *self.history, message]
        stream = self.llm.submit(asked, replace(self.params, seed=seed), chat_template_kwargs=self.names)
        try:
            for chunk in stream:
                write(chunk.text)
        except KeyboardInterrupt:
            if not person:
                raise
        finally:
            stream.cancel()
        found = stream.result()
        self.answers += 1
        self.history += [message, {"role": "assistant", "content": found.text}]
        return found


def talk(chat: Chat) -> None:
    """Reads messages line by line, and writes the answers."""
    person = sys.stdin.isatty()
    report.start_text(chat.llm.session)
    if person:
        if importlib.util.find_spec("readline"):
            import readline  # noqa: F401  # input() then edits a line and knows the last ones
        report.notice(HELP)
    for line in _lines("> " if person else ""):
        if line == "/exit":
            return
        if line == "/clear":
            chat.clear()
            continue
        try:
            found = chat.say({"role": "user", "content": line}, report.write, person)
        except (ValueError, GenerationError) as error:
            report.write("\n")
            report.notice(str(error))
            continue
        report.write("\n")
        if person:
            report.figures(found)


def talk_json(chat: Chat) -> None:
    """Reads a message from each line: a JSON text or a message, or null to forget the conversation. Writes a line of
    JSON for each answer, or {"error": ...}."""
    for line in _lines(""):
        try:
            message = _message(line)
            if message is None:
                chat.clear()
                continue
            found = report.answer_json(chat.llm.session, chat.say(message, lambda _: None, False), None)
        except (UsageError, ValueError, GenerationError) as error:
            found = {"error": str(error)}
        print(json.dumps(found, ensure_ascii=False), flush=True)


def _message(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"a line must be JSON: a text or a message; got {line[:80]!r}") from None
    if isinstance(found, str):
        found = {"role": "user", "content": found}
    if found is not None:
        check_message("a line", found)
    return found


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                report.write("\n")
            return
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input must be text in UTF-8; got {error.reason}") from None
        if line:
            yield line
