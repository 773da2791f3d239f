"""Reads what the model is asked: a prompt, a file or messages. No heavy module is needed to say what is wrong."""

import json
import os
import stat
import sys
from typing import Any

from ..messages import read_message
from .options import short
from .streams import UsageError, reason

Conversation = str | list[dict[str, Any]]
_MOST = 64 << 20  # bytes of a file


def read_conversation(prompt: str | None, file: str | None, messages: str | None, system: str | None) -> Conversation:
    """The user's message, or messages, of exactly one of the three options. Raises UsageError."""
    given = {"--prompt": prompt, "--file": file, "--messages": messages}
    named = [option for option, value in given.items() if value is not None]
    if len(named) != 1:
        raise UsageError(f"one of {', '.join(given)} must be given; got {' and '.join(named) or 'none'}")
    found: Conversation = read_messages(messages) if messages is not None else \
        read_prompt(prompt) if prompt is not None else _text_of("--file", _read_file("--file", file or ""))
    if system is None:
        return found
    found = [{"role": "user", "content": found}] if isinstance(found, str) else found
    if found[0]["role"] == "system":
        raise UsageError("--system must not be given where --messages begin with a system message; got both")
    return [system_message(system), *found]


def system_message(text: str) -> dict[str, Any]:
    return {"role": "system", "content": _text_of("--system", text)}


def read_prompt(text: str) -> str:
    """The prompt; '-' reads standard input."""
    if text == "-":
        if sys.stdin is None:
            raise UsageError("--prompt - reads standard input, which is closed")
        try:
            text = sys.stdin.read()
        except (OSError, ValueError) as error:
            raise UsageError(f"--prompt - must be text on standard input; got {reason(error)}") from None
    return _text_of("--prompt", text)


def read_messages(given: str) -> list[dict[str, Any]]:
    """Messages from JSON, which begins with [, or from a file of it."""
    text = given if given.lstrip().startswith("[") else _read_file("--messages", given)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--messages must be a JSON list of messages; got {short(error)}") from None
    if not isinstance(found, list) or not found:
        raise UsageError(f"--messages must be a JSON list of at least one message; got {short(found)}")
    for i, message in enumerate(found, 1):
        check_message(f"--messages: message {i}", message)
    return found


def check_message(what: str, message: object) -> None:
    try:
        read_message(message, what)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


def read_names(given: str | None) -> dict[str, Any]:
    """The names for a chat template."""
    try:
        found = {} if given is None else json.loads(given)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"--template-kwargs must be a JSON object; got {short(given)}")
    return found


def _text_of(option: str, text: str) -> str:
    if not text:
        raise UsageError(f"{option} must not be empty")
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's sign for bytes that are not text
        raise UsageError(f"{option} must be text in UTF-8; got {short(text)}")
    return text


def _read_file(option: str, name: str) -> str:
    try:
        found = os.stat(os.path.expanduser(name))
        if not stat.S_ISREG(found.st_mode):
            why = "is a directory" if stat.S_ISDIR(found.st_mode) else "is not a regular file"
        elif found.st_size > _MOST:
            why = f"has {found.st_size} bytes, more than {_MOST}"
        else:
            with open(os.path.expanduser(name), encoding="utf-8") as opened:
                return opened.read()
    except FileNotFoundError:
        why = "does not exist"
    except (OSError, ValueError) as error:
        why = f"cannot be read: {reason(error)}"
    raise UsageError(f"{option} must be a file of text; got {short(name)}, which {why}")
