"""Text to token ids and back, chat templates, and a decoder for streams, with the `tokenizers` library alone."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import tokenizers

from . import gguf_file, gguf_tokenizer
from .gguf_reader import open_file
from .weights import CheckpointError, brief, find_model, read_json

_UNFINISHED = "\ufffd"  # what the decoder puts where a character's bytes are not all there


class Tokenizer:
    """A model's tokenizer. `stop_ids` end an answer."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, source: str, stop_ids: Sequence[int] = ()):
        self.backend, self.source = backend, source
        self.chat_template: str | None = config.get("chat_template")
        self.bos_token, self.eos_token = _content(config.get("bos_token")), _content(config.get("eos_token"))
        self.eos_id = backend.token_to_id(self.eos_token) if self.eos_token else None
        self.stop_ids = tuple(dict.fromkeys([*([] if self.eos_id is None else [self.eos_id]), *stop_ids]))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised. add_special_tokens puts BOS before it
        where the model wants one (a chat template writes its own). Raises ValueError for a lone surrogate: Python's
        sign for bytes that are not text."""
        if bad := re.search("[\ud800-\udfff]", text):
            at = bad.start()
            raise ValueError(f"text must be valid Unicode; got {text[at]!r} in {text[max(at - 20, 0):at + 20]!r}")
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder that takes tokens as they come."""
        return TextStream(self, skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The prompt text of a conversation of {"role": ..., "content": ...} messages. Raises CheckpointError when the
        model has no template or its template fails."""
        if not self.chat_template:
            raise CheckpointError(f"{self.source}: expected a chat template; the model has none")
        import jinja2

        try:
            return _environment().from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token, eos_token=self.eos_token, **variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{self.source}: the chat template failed: {brief(error)}") from None


class TextStream:
    """Tokens in, text out, never half a character: the pieces joined are the text of all tokens together."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens)
        self._ids: list[int] = []
        self._start = self._done = 0  # ids[start:done] are printed and give the next ones their context

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; "" while a character is unfinished."""
        self._ids.extend(ids)
        return self._emit(final=False)

    def flush(self) -> str:
        """What is left at the end, an unfinished character included."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        before = self._decode(self._ids[self._start:self._done])
        text = self._decode(self._ids[self._start:])
        if not final and text.endswith(_UNFINISHED):
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
    kept = gguf_file.cached(where)
    if kept and (kept / "tokenizer.json").is_file():
        return _from_directory(kept, str(where))
    reader = open_file(where)
    files = gguf_tokenizer.tokenizer_files(where, reader)
    ends = gguf_file.stop_ids(where, reader)
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    return Tokenizer(backend, json.loads(files["tokenizer_config.json"]), str(where), ends)


def _from_directory(folder: Path, source: str) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: expected this file; got none{_without_tokenizer(folder)}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library's own exception type is bare Exception
        raise CheckpointError(f"{file}: expected a tokenizer of the tokenizers library; got {brief(error)}") from None
    config, ends = _optional(folder / "tokenizer_config.json"), []
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    elif isinstance(config.get("chat_template"), list):  # several, by name
        named = {t.get("name"): t.get("template") for t in config["chat_template"] if isinstance(t, dict)}
        config["chat_template"] = named.get("default")
    for name in ("generation_config.json", "config.json"):
        found = _optional(folder / name).get("eos_token_id")
        ends += found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(e, int) for e in ends):
        raise CheckpointError(f"{folder}: eos_token_id must be an integer or a list of them; got {ends}")
    return Tokenizer(backend, config, source, ends)


def _without_tokenizer(folder: Path) -> str:
    """What to do about it."""
    others = [name for name in ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
              if (folder / name).is_file()]
    if others:
        return (f", but {others[0]}: make it with transformers, AutoTokenizer.from_pretrained(FOLDER)"
                ".save_pretrained(FOLDER)")
    return "; it comes with the model: download it too, with `hf download`"


def _optional(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}


def _content(token: object) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _environment():
    """As transformers renders chat templates. Sandboxed: a template is code from whoever made the checkpoint."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    return made
