"""Converts the tokenizer in a GGUF file into the files of a Hugging Face directory."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..errors import CheckpointError, brief, warn
from .pre import ADDS_BOS, IGNORES_MERGES, PRE, normalizer_of
from .reader import field

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # types of tokens
_LONGEST_PIECE = 256  # characters; merges are looked for at each of them
_SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id"}
_BLANK = "\u2581"  # a blank in a SentencePiece token


def tokenizer_files(path: Path, reader) -> dict[str, str]:
    """The contents of tokenizer.json and tokenizer_config.json, by name."""
    def get(key, kind, default=...):
        return field(path, reader, f"tokenizer.ggml.{key}", kind, default)

    model, pre = get("model", str), get("pre", str, "default")
    tokens = _list(path, "tokens", get("tokens", list), str)
    types = _list(path, "token_type", get("token_type", list, []), int)
    if model == "llama":
        tokenizer, add_bos = _sentencepiece(path, tokens, types, get), True
    elif model == "gemma4":
        tokenizer, add_bos = _of_blanks(path, tokens, _merges(path, get), get("unknown_token_id", int, None)), True
    elif model == "gpt2":
        if get("pre", str, None) is None:
            warn(f"{path}: it does not say how its tokenizer cuts text (tokenizer.ggml.pre); it is cut as in "
                 "llama.cpp, and answers can be worse than the model's")
        tokenizer, add_bos = _bytes_bpe(path, tokens, _merges(path, get), pre), pre in ADDS_BOS
    else:
        raise CheckpointError(f"{path}: tokenizer.ggml.model must be gpt2 (byte-level BPE), llama (SentencePiece) or "
                              f"gemma4; got {model!r}: tokenizer takes the model's directory, with its tokenizer.json")
    added = [AddedToken(t, special=kind == _CONTROL, normalized=False) for t, kind in zip(tokens, types, strict=False)
             if kind in (_CONTROL, _USER_DEFINED) and t]
    tokenizer.add_tokens(added)
    config = {"chat_template": _chat_templates(path, reader), "add_bos_token": get("add_bos_token", bool, add_bos)}
    for name, key in _SPECIAL.items():
        token = get(key, int, None)
        if token is not None and not 0 <= token < len(tokens):
            raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be in [0, {len(tokens)}); got {token}")
        config[name] = None if token is None else tokens[token]
    if config["add_bos_token"] and config["bos_token"]:
        # Under a name of its own: a token's text may have what the template's syntax is made of.
        bos = {"id": "bos", "ids": [get("bos_token_id", int)], "tokens": [config["bos_token"]]}
        tokenizer.post_processor = processors.TemplateProcessing(single="bos:0 $A:0", special_tokens=[bos])
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=1)}


def _chat_templates(path: Path, reader) -> str | list[dict[str, str]] | None:
    """The template, or with those that have names ("tool_use") as tokenizer_config.json lists them."""
    default = field(path, reader, "tokenizer.chat_template", str, None)
    names = _list(path, "chat_templates", field(path, reader, "tokenizer.chat_templates", list, []), str)
    if not names:
        return default
    found = {name: field(path, reader, f"tokenizer.chat_template.{name}", str) for name in names if name != "default"}
    return [{"name": name, "template": text} for name, text in ({"default": default} | found).items() if text]


def _merges(path: Path, get: Callable) -> list[tuple[str, str]]:
    """The pairs; a blank divides each, and can be the first character of its first part."""
    found = []
    for pair in _list(path, "merges", get("merges", list), str):
        at = pair.find(" ", 1)
        found.append((pair[:at], pair[at + 1:]) if at > 0 else (pair, ""))
    return found


def _bpe(path: Path, tokens: list[str], merges: list[tuple[str, str]], **options) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, **options))
    except Exception as error:  # the library's own exception type is bare Exception
        raise CheckpointError(f"{path}: tokenizer.ggml.merges must fit its tokens; got {brief(error)}") from None


def _bytes_bpe(path: Path, tokens: list[str], merges: list[tuple[str, str]], pre: str) -> Tokenizer:
    """Merges of bytes that are written as characters."""
    if pre not in PRE:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre must be one of {', '.join(sorted(PRE))}; got {pre!r}: "
                              "tokenizer takes the model's directory, with its tokenizer.json")
    tokenizer = _bpe(path, tokens, merges, ignore_merges=pre in IGNORES_MERGES)
    if (normalizer := normalizer_of(pre)) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(path: Path, tokens: list[str], types: list[int], get: Callable) -> Tokenizer:
    """Of a SentencePiece model: the pair with the highest score is merged first, and a character that is no token is
    its bytes."""
    scores = _list(path, "scores", get("scores", list), float)
    if not len(types) == len(scores) == len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.scores and token_type must have an item for each of "
                              f"{len(tokens)} tokens; got {len(scores)} and {len(types)}")
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(f"{path}: tokenizer.ggml.scores must be finite")
    parts = {t for t, kind in zip(tokens, types, strict=True) if kind not in (_CONTROL, _UNKNOWN, _BYTE)}
    found = []
    for i, (text, score) in enumerate(zip(tokens, scores, strict=True)):
        if text in parts and len(text) <= _LONGEST_PIECE:
            found += [(-score, i, text[:at], text[at:]) for at in range(1, len(text))
                      if text[:at] in parts and text[at:] in parts]
    merges = [(left, right) for _, _, left, right in sorted(found)]
    prefix = get("add_space_prefix", bool, True)
    return _of_blanks(path, tokens, merges, get("unknown_token_id", int, 0), prefix)


def _of_blanks(path: Path, tokens: list[str], merges: list[tuple[str, str]], unknown: int | None,
               prefix: bool = False) -> Tokenizer:
    """Merges of characters, in which a blank is another character. prefix: one comes before the text."""
    if unknown is not None and not 0 <= unknown < len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.unknown_token_id must be in [0, {len(tokens)}); got {unknown}")
    tokenizer = _bpe(path, tokens, merges, unk_token=None if unknown is None else tokens[unknown], fuse_unk=True,
                     byte_fallback=True)
    before = [normalizers.Prepend(_BLANK)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _BLANK)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *after])
    return tokenizer


def _list(path: Path, key: str, values: list, kind: type) -> list:
    """The values, all of one type."""
    wrong = next((value for value in values if type(value) is not kind), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be a list of {kind.__name__}; "
                              f"got {type(wrong).__name__} in it")
    return values
