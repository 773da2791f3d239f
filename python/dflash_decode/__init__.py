"""DFlash speculative decoding: a thin loop over the public ops of dflash_kernels.

The names below are loaded when they are first used: importing the package, as the command line does, loads no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import CheckpointError, CheckpointNotFound, load_checkpoint
    from .checkpoint.tokenizer import load_tokenizer
    from .llm.api import LLM
    from .llm.outputs import Chunk, Completion, GenerationError
    from .llm.params import GenerationParams
    from .logprobs import TokenLogprobs
    from .loop import Decoder
    from .model.drafter import Drafter
    from .requests import Event, Request
    from .sampling import SamplingParams
    from .session import Session

_WHERE = {
    "CheckpointError": ".checkpoint",
    "CheckpointNotFound": ".checkpoint",
    "Chunk": ".llm.outputs",
    "Completion": ".llm.outputs",
    "Decoder": ".loop",
    "Drafter": ".model.drafter",
    "Event": ".requests",
    "GenerationError": ".llm.outputs",
    "GenerationParams": ".llm.params",
    "LLM": ".llm.api",
    "Request": ".requests",
    "SamplingParams": ".sampling",
    "Session": ".session",
    "TokenLogprobs": ".logprobs",
    "load_checkpoint": ".checkpoint",
    "load_tokenizer": ".checkpoint.tokenizer",
}
__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "Chunk",
    "Completion",
    "Decoder",
    "Drafter",
    "Event",
    "GenerationError",
    "GenerationParams",
    "LLM",
    "Request",
    "SamplingParams",
    "Session",
    "TokenLogprobs",
    "load_checkpoint",
    "load_tokenizer",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
