"""Converts the tokenizer in a GGUF file into the files of a Hugging Face directory."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError, brief
from .reader import field

_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id"}
_QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


# tokenizer.ggml.pre -> how text is cut before the merges
_PRE = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "qwen2": lambda: _split(_QWEN2),
    "llama-bpe": lambda: _split(_LLAMA3),
}


def tokenizer_files(path: Path, reader) -> dict[str, str]:
    """The contents of tokenizer.json and tokenizer_config.json, by name."""
    def get(key, kind, default=...):
        return field(path, reader, f"tokenizer.ggml.{key}", kind, default)

    model, pre = get("model", str), get("pre", str, "default")
    if model != "gpt2":
        raise CheckpointError(f"{path}: tokenizer.ggml.model must be gpt2 (byte-level BPE); got {model!r}")
    if pre not in _PRE:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre must be one of {', '.join(_PRE)}; got {pre!r}")
    tokens, types = _list(path, "tokens", get("tokens", list), str), _list(path, "token_type",
                                                                          get("token_type", list, []), int)
    merges = [tuple(pair.split(" ", 1)) for pair in _list(path, "merges", get("merges", list), str)]
    try:
        bpe = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library's own exception type is bare Exception
        raise CheckpointError(f"{path}: tokenizer.ggml.merges must fit its tokens; got {brief(error)}") from None
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(t, special=kind == _CONTROL, normalized=False) for t, kind in zip(tokens, types, strict=False)
             if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens(added)
    config = {"chat_template": field(path, reader, "tokenizer.chat_template", str, None),
              "add_bos_token": get("add_bos_token", bool, False)}
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


def _list(path: Path, key: str, values: list, kind: type) -> list:
    """The values, all of one type."""
    wrong = next((value for value in values if type(value) is not kind), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be a list of {kind.__name__}; "
                              f"got {type(wrong).__name__} in it")
    return values
