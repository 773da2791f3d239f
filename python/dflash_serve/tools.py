"""Calls of tools in a text, where the format of the model's family is known."""

import json
import secrets
from dataclasses import dataclass

from dflash_decode import LLM

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OTHERS = ("<function=", "<arg_key>")  # other families' formats between the same tags


@dataclass(frozen=True)
class Call:
    id: str
    name: str
    arguments: str  # JSON


def is_known(llm: LLM) -> bool:
    """Whether the model's template asks for calls as Qwen's and Hermes' do, <tool_call>{json}</tool_call>, and the tags
    are text that the model writes."""
    template = json.dumps(llm.tokenizer.chat_template)
    special = {token.content for token in llm.tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    return (OPEN in template and "arguments" in template and not any(other in template for other in _OTHERS)
            and OPEN not in special)


class CallReader:
    """Takes calls out of a text that arrives in pieces. What is no call stays in the text, with the space before the
    calls, if text follows them. most: further calls are dropped."""

    def __init__(self, most: int | None = None):
        self._held, self._most, self.count = "", most, 0
        self._gap = ""  # the space before the call that has begun
        self._inside = self._after = False  # of a call; a call, with nothing but space since

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """The text and the calls that are complete with this piece."""
        self._held += piece
        said, calls = "", list[Call]()
        while (at := self._held.find(mark := CLOSE if self._inside else OPEN)) >= 0:
            before, self._held = self._held[:at], self._held[at + len(mark):]
            if self._inside:
                text, found = self._ended(before, CLOSE)
                said, calls = said + text, calls + found
            else:
                if text := self._spoken(before):
                    said, self._gap = said + text.rstrip(), text[len(text.rstrip()):]
            self._inside = not self._inside
        if self._inside:
            return said, calls
        self._held = self._spoken(self._held)
        kept = next((n for n in range(min(len(OPEN) - 1, len(self._held)), 0, -1) if self._held.endswith(OPEN[:n])), 0)
        done = self._held[:len(self._held) - kept].rstrip()
        self._held = self._held[len(done):]
        return said + done, calls

    def flush(self) -> tuple[str, list[Call]]:
        """The rest, at the end: a call that was not closed is one if its JSON is whole."""
        held, self._held = self._held, ""
        if not self._inside:
            return self._spoken(held), []
        self._inside = False
        return self._ended(held, "")

    def _spoken(self, text: str) -> str:
        if self._after and (text := text.lstrip()):
            text, self._gap, self._after = self._gap + text, "", False
        return text

    def _ended(self, text: str, close: str) -> tuple[str, list[Call]]:
        try:
            found = json.loads(text)
            name, arguments = found["name"], found.get("arguments", {})
            if not isinstance(name, str):
                raise ValueError
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            (name + written).encode()  # half of an emoji's escape is a text to Python, and to no client
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            gap, self._gap = self._gap, ""
            return f"{gap}{OPEN}{text}{close}", []
        self.count, self._after = self.count + 1, True
        if self._most is not None and self.count > self._most:
            return "", []
        return "", [Call(f"call_{secrets.token_hex(12)}", name, written)]
