"""DFlash speculative decoding: a thin loop over the public ops of dflash_kernels.

The names below are loaded when they are first used: importing the package, as the command line does, loads no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import CheckpointError, CheckpointNotFound, load_checkpoint
    from .checkpoint.tokenizer import load_tokenizer
    from .loop import Decoder
    from .model.drafter import Drafter
    from .requests import Event, Request
    from .sampling import SamplingParams
    from .session import Session

_WHERE = {
    "CheckpointError": ".checkpoint",
    "CheckpointNotFound": ".checkpoint",
    "Decoder": ".loop",
    "Drafter": ".model.drafter",
    "Event": ".requests",
    "Request": ".requests",
    "SamplingParams": ".sampling",
    "Session": ".session",
    "load_checkpoint": ".checkpoint",
    "load_tokenizer": ".checkpoint.tokenizer",
}
__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "Decoder",
    "Drafter",
    "Event",
    "Request",
    "SamplingParams",
    "Session",
    "load_checkpoint",
    "load_tokenizer",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
