"""Tokenizers, chat templates and streaming decoders, with only the `tokenizers` library."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers

from . import tokenizer_config
from .errors import CheckpointError, brief, check_size
from .find import find_model
from .gguf import file as gguf_file
from .gguf import tokenizer as gguf_tokenizer
from .gguf.reader import open_file

_LARGEST_FILE = 1 << 28  # bytes of tokenizer.json; the largest vocabularies have 35 MB
# Arguments of transformers' apply_chat_template that mean something else than a name for the template.
_ELSEWHERE = ("chat_template", "continue_final_message", "max_length", "padding", "return_assistant_tokens_mask",
              "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation")
_LONG = 1 << 14  # characters, which take some milliseconds
_UNFINISHED = "\ufffd"  # what the decoder puts where a character's bytes are not all there
_OFTEN = 64  # tries with each doubling of such a text


class Tokenizer:
    """A model's tokenizer.

    stop_ids: the tokens that end an answer.
    special_tokens: the texts of the special tokens, by name ("bos_token").
    chat_template: a text, texts by name, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, source: str, stop_ids: Sequence[int] = ()):
        self.backend, self.source = backend, source
        self.chat_template = tokenizer_config.chat_templates(config, source)
        self.special_tokens = tokenizer_config.special_tokens(config, source)
        self.bos_token, self.eos_token = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        self.eos_id = backend.token_to_id(self.eos_token) if self.eos_token else None
        self.stop_ids = tuple(dict.fromkeys([*([] if self.eos_id is None else [self.eos_id]), *stop_ids]))
        self._texts: dict[int, str] = {}

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is this text, or None."""
        return self.backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The token ids of `text`. Special tokens in the text are recognised.

        add_special_tokens: puts BOS first where the model wants one (a chat template writes its own). Raises TypeError
        for what is no text, ValueError for a lone surrogate, which Python uses for bytes that are not text, and
        CheckpointError where the model's tokenizer fails.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string; got {type(text).__name__}")
        if bad := re.search("[\ud800-\udfff]", text):
            at = bad.start()
            raise ValueError(f"text must be valid Unicode; got {text[at]!r} in {text[max(at - 20, 0):at + 20]!r}")
        with _library(self.source):
            if len(text) < _LONG:
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
            # Of several texts the library lets other threads run meanwhile, and of one it does not.
            return self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        with _library(self.source):
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> str:
        """The text of one token inside of a text: some tokenizers drop the space before the first one. A part of a
        character is the character U+FFFD."""
        if token not in self._texts:
            alone, twice = (self.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
            self._texts[token] = twice[len(alone):]
        return self._texts[token]

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder that takes tokens as they arrive."""
        return TextStream(self, skip_special_tokens)

    def apply_chat_template(self, messages: Iterable[dict], add_generation_prompt: bool = True, *,
                            tools: Iterable[dict] | None = None, documents: Iterable[dict] | None = None,
                            **variables) -> str:
        """The prompt of a conversation of {"role": ..., "content": ...} messages, as transformers writes it.

        tools: JSON schemas of functions.
        documents: entries with "title" and "text".
        variables: further names for the template ("enable_thinking"), which take precedence over the special tokens.

        Raises TypeError and ValueError for malformed arguments. Raises CheckpointError if the model has no template, or
        its template fails, exceeds the budget of chat_template/budget.py, or loops forever.
        """
        for name in _ELSEWHERE:
            if variables.pop(name, None):
                raise ValueError(f"apply_chat_template makes text of the model's own template; got {name}")
        from .. import chat_template  # imported here: token-id prompts need no jinja2

        return chat_template.render(self._template(tools), self.source, messages, tools, documents,
                                    add_generation_prompt, self.special_tokens | variables)

    def _template(self, tools: object) -> str:
        if not isinstance(self.chat_template, dict):
            found = self.chat_template
        elif tools is not None and "tool_use" in self.chat_template:
            found = self.chat_template["tool_use"]
        else:
            found = self.chat_template.get("default")
            if self.chat_template and found is None:
                raise CheckpointError(f"{self.source}: expected a chat template named default; "
                                      f"got {', '.join(sorted(self.chat_template))}")
        if not found:
            raise CheckpointError(f"{self.source}: expected a chat template; the model has none")
        return found


class TextStream:
    """Decodes a stream of tokens without splitting a character. The joined pieces are the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens)
        self._ids: list[int] = []
        self._start = self._done = 0  # ids[start:done] are printed and give the next ones their context
        self._wanted = 0  # ids with which the next try is made

    def push(self, ids: Iterable[int]) -> str:
        """The text that is complete with these tokens; "" while a character is unfinished."""
        self._ids.extend(ids)
        return self._emit(final=False)

    def flush(self) -> str:
        """The remaining text at the end, including an unfinished character."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        if not final and len(self._ids) < self._wanted:
            return ""
        before = self._decode(self._ids[self._start:self._done])
        text = self._decode(self._ids[self._start:])
        if not final and text.endswith(_UNFINISHED):
            # Of an answer that is never a whole character, a try with each token would take quadratic time.
            self._wanted = len(self._ids) + 1 + (len(self._ids) - self._start) // _OFTEN
            return ""
        if len(text) > len(before):
            self._start = self._done
        self._done = len(self._ids)
        return text[len(before):]


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model directory (tokenizer.json, tokenizer_config.json, chat_template.jinja), of a GGUF file,
    or of a known model. Raises CheckpointError."""
    where = find_model(path)
    if where.is_dir():
        return _from_directory(where, str(where))
    kept = gguf_file.cached(where) or gguf_file.cached(where, blocks=True)
    if kept and all((kept / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        with contextlib.suppress(CheckpointError):  # a damaged copy: the file itself has all of it
            return _from_directory(kept, str(where))
    reader = open_file(where)
    files = gguf_tokenizer.tokenizer_files(where, reader)
    ends = gguf_file.stop_ids(where, reader)
    with _library(str(where)):
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    return Tokenizer(backend, json.loads(files["tokenizer_config.json"]), str(where), ends)


def _from_directory(folder: Path, source: str) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{file}: expected this file; got none{_without_tokenizer(folder)}")
    check_size(file, _LARGEST_FILE)
    with _library(str(file)):
        backend = tokenizers.Tokenizer.from_file(str(file))
    tokenizer_config.prepare(backend, str(file))
    return Tokenizer(backend, tokenizer_config.read_config(folder), source, tokenizer_config.stop_ids(folder))


def _without_tokenizer(folder: Path) -> str:
    """The advice for a model without a tokenizer."""
    others = [name for name in ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
              if (folder / name).is_file()]
    if others:
        return (f", but {others[0]}: make it with transformers, AutoTokenizer.from_pretrained(FOLDER)"
                ".save_pretrained(FOLDER)")
    return "; it comes with the model: download it too, with `hf download`"


@contextlib.contextmanager
def _library(source: str) -> Iterator[None]:
    """Turns the tokenizers library's errors, including its bare Exception and Rust panics, into CheckpointErrors."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{source}: expected a tokenizer of the tokenizers library; "
                                  f"got {brief(error)}") from None
        raise
