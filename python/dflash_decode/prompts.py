"""Converts prompts (text, messages or token ids) to token ids."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .checkpoint.errors import CheckpointError
from .checkpoint.tokenizer import Tokenizer
from .inputs import integer, is_token_list, items, shown
from .messages import read_message

_KINDS = "a text, a list of messages {'role': ..., 'content': ...}, or token ids"
_ONE_BY_ONE = "give each prompt's ids separately, in a list and without padding"


@dataclass(frozen=True)
class Reading:
    """How prompts become token ids.

    chat: a text is a user's message, where the model has a chat template; else a text that is continued.
    tools, variables: for the template, as apply_chat_template takes them.
    """

    chat: bool = True
    tools: Iterable[dict] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


CHAT = Reading()


def read_prompt(tokenizer: Tokenizer, vocab: int, prompt: Any, what: str, reading: Reading = CHAT) -> list[int]:
    """The token ids of one prompt. Error messages begin with `what`, its name."""
    if isinstance(prompt, str):
        return _of_text(tokenizer, prompt, what, reading)
    if isinstance(prompt, Mapping) and "input_ids" in prompt:  # what a tokenizer of transformers answers
        return _of_ids(vocab, _unpadded(prompt, what), what)
    if isinstance(prompt, Mapping):
        prompt = [prompt]
    if is_token_list(prompt) and not len(prompt):
        raise ValueError(f"{what} must have at least 1 token; got {shown(prompt)}")
    if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
        return _of_messages(tokenizer, prompt, what, reading)
    return _of_ids(vocab, prompt, what)


def read_prompts(tokenizer: Tokenizer, vocab: int, prompts: Any, what: str,
                 reading: Reading = CHAT) -> list[list[int]]:
    """The token ids of several prompts, or of a single prompt in place of a list."""
    if is_single(prompts):
        return [read_prompt(tokenizer, vocab, prompts, f"{what}: prompt 1", reading)]
    if getattr(prompts, "ndim", 1) != 1:  # rows of one length: what is padding is not to be seen
        raise ValueError(f"{what}: token ids must have shape (n,) or (1, n); got {tuple(prompts.shape)}: {_ONE_BY_ONE}")
    found = [] if isinstance(prompts, (bytes, bytearray, set, frozenset)) else prompts
    if found is not prompts or not hasattr(prompts, "__iter__"):  # a set has no first prompt
        raise TypeError(f"{what}: prompts must be one prompt or a list of them, each {_KINDS}; got {_kind(prompts)}")
    found = list(prompts)
    if not isinstance(prompts, Sequence) and found and integer(found[0]) is not None:
        raise TypeError(f"{what}: token ids must be in a list, a tensor or an array; got {_kind(prompts)}")
    return [read_prompt(tokenizer, vocab, prompt, f"{what}: prompt {i}", reading)
            for i, prompt in enumerate(found, 1)]


def _kind(value: object) -> str:
    return f"{shown(value)}, of type {type(value).__name__}"


def is_single(prompts: Any) -> bool:
    """Whether the value is one prompt: a text, a message or several, or token ids. An empty list is no prompt."""
    if isinstance(prompts, (str, Mapping)):
        return True
    if isinstance(prompts, torch.Tensor) or hasattr(prompts, "__array__"):
        return prompts.ndim < 2 or len(prompts) == 1
    return isinstance(prompts, Sequence) and len(prompts) > 0 and not isinstance(prompts, (bytes, bytearray)) and (
        isinstance(prompts[0], Mapping) and "input_ids" not in prompts[0]
        or isinstance(prompts[0], (bool, float, type(None))) or integer(prompts[0]) is not None)


def _of_text(tokenizer: Tokenizer, text: str, what: str, reading: Reading) -> list[int]:
    if reading.chat and tokenizer.chat_template:
        return _of_template(tokenizer, [{"role": "user", "content": text}], what, reading)
    return _encoded(what, text, lambda: tokenizer.encode(text, add_special_tokens=True))


def _of_messages(tokenizer: Tokenizer, messages: Sequence, what: str, reading: Reading) -> list[int]:
    found = [read_message(message, f"{what}: message {i}") for i, message in enumerate(messages, 1)]
    return _of_template(tokenizer, found, what, reading)


def _of_template(tokenizer: Tokenizer, messages: list[dict], what: str, reading: Reading) -> list[int]:
    return _encoded(what, messages, lambda: tokenizer.encode(
        tokenizer.apply_chat_template(messages, tools=reading.tools, **reading.variables)))


def _encoded(what: str, prompt: object, encode: Callable[[], list[int]]) -> list[int]:
    try:
        ids = encode()
    except CheckpointError:  # a fault of the model; the message names its file
        raise
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None
    if not ids:
        raise ValueError(f"{what} must have at least 1 token; got {shown(prompt)}")
    return ids


def _unpadded(encoded: Mapping, what: str) -> object:
    """The ids of a tokenizer's result without padding, which would become part of the prompt."""
    ids, mask = encoded["input_ids"], encoded.get("attention_mask")
    if isinstance(ids, Sequence) and len(ids) > 1 and any(is_token_list(row) for row in ids):
        raise ValueError(f"{what}: input_ids must be of one prompt; got a batch of {len(ids)}: {_ONE_BY_ONE}")
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError(f"{what}: input_ids must be without padding; got an attention_mask with zeros")
    return ids


def _of_ids(vocab: int, ids: Any, what: str) -> list[int]:
    if isinstance(ids, torch.Tensor) or hasattr(ids, "__array__"):
        if ids.ndim == 2 and len(ids) == 1:  # a batch of one, as tokenizers return it
            ids = ids[0]
        if ids.ndim != 1:
            raise ValueError(f"{what}: token ids must have shape (n,) or (1, n); got {tuple(ids.shape)}: {_ONE_BY_ONE}")
    elif isinstance(ids, Sequence) and len(ids) == 1 and is_token_list(ids[0]):
        ids = ids[0]
    if not is_token_list(ids):
        raise TypeError(f"{what} must be {_KINDS}; got {shown(ids)}")
    if not len(ids):
        raise ValueError(f"{what} must have at least 1 token; got {shown(ids)}")
    found = []
    for token in items(ids):
        value = integer(token)
        if value is None:
            several = f" in a list: {_ONE_BY_ONE}" if is_token_list(token) else (
                " in a list: give each prompt by itself" if isinstance(token, Sequence) else "")
            raise TypeError(f"{what} must be {_KINDS}; got {shown(token)}{several}")
        if not 0 <= value < vocab:
            raise ValueError(f"{what} must hold token ids in [0, {vocab}); got {value}")
        found.append(value)
    return found
