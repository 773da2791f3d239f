"""Reads and checks the arguments of the public Python entry points, before anything is loaded or allocated."""

import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError, CheckpointNotFound
from .dtypes import AUTO, NAMES, dtype_name
from .inputs import integer, shown

_DTYPES = {name: getattr(torch, name) for name in sorted(set(NAMES.values()) - {AUTO})}


def whole(what: str, name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer of Python or numpy. Raises TypeError or ValueError."""
    limits = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    found = integer(value)
    if found is None:
        raise TypeError(f"{what}: {name} must be {limits}; got {shown(value)}")
    if found < least or (most is not None and found > most):
        raise ValueError(f"{what}: {name} must be {limits}; got {shown(value)}")
    return found


def choice(what: str, name: str, value: object, kind: type[Enum]) -> str:
    """One of a choice's words. Raises TypeError or ValueError."""
    known = [word.value for word in kind]
    if not isinstance(value, str) or value not in known:
        raise (ValueError if isinstance(value, str) else TypeError)(
            f"{what}: {name} must be one of {', '.join(known)}; got {shown(value)}")
    return value


def of_type(what: str, name: str, value: object, wanted: Any, words: str) -> None:
    """Checks a type. wanted: as isinstance takes it. words: the expected type in a user's words. Raises TypeError."""
    if not isinstance(value, wanted):
        raise TypeError(f"{what}: {name} must be {words}; got {shown(value)}")


def path_text(what: str, name: str, value: Any) -> str:
    """A path, or a known name, as text."""
    of_type(what, name, value, (str, os.PathLike), "a path or a name")
    if not (text := os.fsdecode(value)):
        raise CheckpointNotFound(f"{what}: {name} must be a path or a name; got an empty text")
    return text


def exists(path: str) -> bool:
    """Whether the path exists; False also for an invalid path (an unknown ~user, a name too long, a NUL)."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def read_dtype(what: str, value: object) -> torch.dtype | None:
    """The dtype, or None for "auto". Takes torch's dtypes, their names, common short names, and numpy's dtypes."""
    text = value
    if not isinstance(value, str):
        text = value if isinstance(value, torch.dtype) else getattr(value, "name", getattr(value, "__name__", None))
    # Python's float has 64 bits; only torch calls 32 of them so.
    known = dtype_name(str(text)) if value is not float else None
    if known is None:
        wrong = TypeError if text is None else ValueError
        raise wrong(f"{what}: dtype must be 'auto', 'bfloat16', 'float16' or 'float32', or torch's own; "
                    f"got {shown(value)}")
    return None if known == AUTO else _DTYPES[known]


def stored_dtype(where: Path, config: Mapping) -> torch.dtype:
    """The dtype of "auto" for a model: that of its config.json, or bfloat16 if it names none. Raises CheckpointError
    for an unsupported one."""
    inner = config.get("text_config")
    for fields in (config, inner if isinstance(inner, Mapping) else {}):
        for name in ("dtype", "torch_dtype"):
            if (value := fields.get(name)) is not None:
                if not isinstance(value, str) or value not in _DTYPES:
                    raise CheckpointError(f"{where}: {name} must be {', '.join(_DTYPES)} for "
                                          f"dtype 'auto'; got {shown(value)}: choose one")
                return _DTYPES[value]
    return torch.bfloat16


def read_device(what: str, value: Any) -> torch.device:
    """"cpu", or an available GPU. Raises TypeError or ValueError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        device = torch.device(value)
    except (TypeError, RuntimeError) as error:
        wrong = TypeError if isinstance(error, TypeError) else ValueError
        raise wrong(f"{what}: device must be 'cpu' or a CUDA device, 'cuda' or 'cuda:N'; got {shown(value)}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{what}: device must be 'cpu' or a CUDA device, 'cuda' or 'cuda:N'; got {shown(value)}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"{what}: device {shown(value)} needs a GPU that torch can use; torch "
                             f"{torch.__version__} finds none")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"{what}: device must be one of the {torch.cuda.device_count()} GPUs that torch finds, "
                             f"counted from 0; got {shown(value)}")
    return device


# The attributes of a target that a drafter and a decoder need.
_OF_TARGET = {
    "Drafter": ("vocab_size", "hidden_size", "num_layers", "max_context", "dtype", "device", "embedding",
                "embedding_scale", "head"),
    "Decoder": ("vocab_size", "max_context", "dtype", "device", "cache", "make_pass", "next_ids", "logits"),
}


def check_target(what: str, target: object) -> None:
    """Raises TypeError for an object that cannot be a target, such as a path. what: "Drafter" or "Decoder"."""
    if missing := [name for name in _OF_TARGET[what] if not hasattr(target, name)]:
        raise TypeError(f"{what}: target must be a NativeTarget, an HFTarget or what has all of a Target; got "
                        f"{shown(target)}, which has no {missing[0]}")
