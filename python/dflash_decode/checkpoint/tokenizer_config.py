"""Reads the tokenizer settings of a model directory: special tokens, chat templates, stop tokens."""

import json
import math
from pathlib import Path

import tokenizers

from ..chat_template.budget import LONGEST_TEMPLATE
from .errors import CheckpointError, brief, read_json, read_text

_LARGEST_TEMPLATE = 4 * LONGEST_TEMPLATE  # bytes
_GROWTH = 1024  # characters or tokens that a tokenizer's steps may make of one
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_optional(file: Path) -> dict:
    """The JSON object in `file`; {} if there is no such file."""
    return read_json(file) if file.exists() else {}


def read_config(folder: Path) -> dict:
    """tokenizer_config.json, completed from other files: special_tokens_map.json of older checkpoints, and templates in
    files of their own ("chat_template" is a dict of them where they have names)."""
    config = read_optional(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_optional(folder / "special_tokens_map.json")
    by_name = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    named = {file.stem: read_text(file, _LARGEST_TEMPLATE) for file in by_name}
    if (folder / "chat_template.jinja").exists():
        named["default"] = read_text(folder / "chat_template.jinja", _LARGEST_TEMPLATE)
    if named:
        config["chat_template"] = named["default"] if [*named] == ["default"] else named
    return config


def chat_templates(config: dict, source: str) -> str | dict[str, str] | None:
    """The template, or the templates by name."""
    found = config.get("chat_template")
    if isinstance(found, list):
        if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found):
            raise CheckpointError(f"{source}: chat_template must be a list of {{\"name\", \"template\"}}; "
                                  f"got {brief(ValueError(repr(found)))}")
        found = {one["name"]: one.get("template") for one in found}
    texts = found.values() if isinstance(found, dict) else [] if found is None else [found]
    for text in texts:
        if not isinstance(text, str):
            raise CheckpointError(f"{source}: chat_template must be text; got {type(text).__name__}")
    return found


def special_tokens(config: dict, source: str) -> dict[str, str]:
    """Names and texts of a model's special tokens: the common ones, and its own ("image_token")."""
    own = {name: token for name, token in config.items() if name.endswith("_token") and name not in _NAMED
           and (isinstance(token, str) or (isinstance(token, dict) and "content" in token))}
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(key), dict):
            own |= config[key]
    tokens = {name: config[name] for name in _NAMED if config.get(name) is not None} | own
    return {name: _content(name, token, source) for name, token in tokens.items()}


def _content(name: str, token: object, source: str) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"{source}: {name} must be text or an object with \"content\"; "
                              f"got {brief(ValueError(repr(token)))}")
    return text


def stop_ids(folder: Path) -> list[int]:
    """The stop tokens of generation_config.json and config.json."""
    ends = []
    for name in ("generation_config.json", "config.json"):
        found = read_optional(folder / name).get("eos_token_id")
        given = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(end) is int and 0 <= end < 1 << 31 for end in given):
            raise CheckpointError(f"{folder / name}: eos_token_id must be an integer or a list of them, from 0 on; "
                                  f"got {brief(ValueError(repr(found)))}")
        ends += given
    return ends


def prepare(backend: tokenizers.Tokenizer, source: str) -> None:
    """Turns off truncation and padding that tokenizer.json kept from training, and refuses steps that multiply a text:
    thirty replacements of "a" by "aa" make gigabytes."""
    backend.no_truncation()
    backend.no_padding()
    for name in ("normalizer", "decoder", "post_processor"):
        step = getattr(backend, name)
        growth = 1 if step is None else _growth(json.loads(step.__getstate__()))
        if growth > _GROWTH:
            raise CheckpointError(f"{source}: {name} must make at most {_GROWTH} of one character or token; "
                                  f"got {min(growth, 10**9)} or more")


def _growth(step: dict) -> int:
    parts = step.get("normalizers") or step.get("decoders") or step.get("processors")
    if parts:
        return math.prod(map(_growth, parts))
    if step.get("type") == "Replace":
        text, made = step["pattern"].get("String"), len(step["content"])
        # A regular expression may match nothing, before each character.
        return max(1, math.ceil(made / len(text))) if text else 1 + made
    if step.get("type") == "TemplateProcessing":
        return max(1, sum("Sequence" in piece for piece in step["single"]))
    return 1
