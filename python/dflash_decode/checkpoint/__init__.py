"""Reads checkpoints: a Hugging Face directory, a GGUF file, or the name of a model from an installed package.

Weights come only from safetensors or GGUF, never from pickles. Every failure is a CheckpointError with the file, the
expected value and the actual one.
"""

import os

import torch

from .blocks import Blocks
from .errors import CheckpointError, CheckpointNotFound
from .find import KNOWN, drafter_of, drafters, find_model, no_drafter
from .safetensors import Checkpoint, read_directory

__all__ = ["KNOWN", "Blocks", "Checkpoint", "CheckpointError", "CheckpointNotFound", "drafter_of", "drafters",
           "find_model", "load_checkpoint", "no_drafter", "read_directory"]


def load_checkpoint(path: str | os.PathLike, dtype: torch.dtype | None = None, *, blocks: bool = False) -> Checkpoint:
    """Reads a checkpoint.

    path: a directory with config.json and model.safetensors (or shards with model.safetensors.index.json), a .gguf
        file, or a known name such as "smollm2".
    dtype: the dtype of a dequantised GGUF file; None is bfloat16, which is kept under the user's cache directory.
        Safetensors are memory-mapped in their stored dtype.
    blocks: keeps the weights of a GGUF file in its blocks, as Blocks, where the ops have their format.

    Raises CheckpointError.
    """
    where = find_model(path)
    if where.is_dir():
        return read_directory(where)
    from .gguf import file as gguf_file

    return gguf_file.load(where, torch.bfloat16 if dtype is None else dtype, blocks)
