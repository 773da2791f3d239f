"""A drafter's embedding, LM head and vocabulary: its own, or the target's; and the files that hold parts of them."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dflash_kernels import PackedWeight, embed_tokens

from ..checkpoint.errors import CheckpointError, read_json
from ..checkpoint.fields import MOST, Fields
from ..checkpoint.safetensors import MASK_EMBEDDING, read_safetensors
from . import Target
from .config import DraftConfig
from .tensors import Tensors

_WHAT = "draft checkpoint"


@dataclass(frozen=True)
class Vocabulary:
    """embedding (rows, H): of the block's tokens, scaled, with the mask's own row. head (rows, H): None is the
    target's. ids_of_draft (rows,): the target's id of each row of the head; None is the row's number. num_valid: the
    rows of the head that can be drafted."""

    embedding: torch.Tensor | PackedWeight
    head: torch.Tensor | None
    ids_of_draft: torch.Tensor | None
    num_valid: int


def take_vocabulary(tensors: Tensors, c: DraftConfig, target: Target) -> Vocabulary:
    """Takes what the checkpoint has of its own. Raises ValueError for what is missing or does not fit."""
    tied = c.tied and c.own_head is not False and "embed_tokens.weight" in tensors
    for name, flag, instead in (("embed_tokens", c.own_embedding, False), ("lm_head", c.own_head, tied)):
        there = f"{name}.weight" in tensors
        if flag is not None and flag != (there or instead):
            raise ValueError(f"{_WHAT}: tensor {name}.weight must {'' if flag else 'not '}be there, as the config "
                             f"says; got {'it' if there else 'nothing'}")
    embedding, own = _take_embedding(tensors, c, target)
    rows = c.draft_vocab_size
    head = tensors.take("lm_head.weight", rows, c.hidden_size) if "lm_head.weight" in tensors else None
    if head is None and tied:
        head, rows = own, c.vocab_size
    if head is None and target.hidden_size != c.hidden_size:
        raise ValueError(f"{_WHAT}: tensor lm_head.weight must be there, as hidden_size {c.hidden_size} is not the "
                         f"target's {target.hidden_size}; got nothing")
    tensors.drop("t2d")  # the same map as d2t, as a mask over the target's ids
    ids = None
    if "d2t" in tensors and head is None:
        raise ValueError(f"{_WHAT}: tensor lm_head.weight must be there, as d2t names the tokens of its rows; got "
                         "nothing")
    if "d2t" in tensors:
        ids = torch.arange(rows, device=target.device) + tensors.take_ids("d2t", rows)
        if not bool(((ids >= 0) & (ids < target.vocab_size)).all()):
            raise ValueError(f"{_WHAT}: d2t must be offsets to ids below {target.vocab_size}; "
                             f"got ids from {int(ids.min())} to {int(ids.max())}")
    elif head is not None and c.draft_vocab_size < c.vocab_size:
        raise ValueError(f"{_WHAT}: tensor d2t must be there with shape ({c.draft_vocab_size},), as draft_vocab_size "
                         f"is below vocab_size = {c.vocab_size}; got nothing")
    # A head padded beyond the target's vocabulary must not draft an id that the target does not have, and without d2t a
    # smaller draft vocabulary is the first rows of the target's head.
    return Vocabulary(embedding, head, ids, rows if ids is not None else min(rows, target.vocab_size))


def _take_embedding(tensors: Tensors, c: DraftConfig, target: Target) -> tuple[
        torch.Tensor | PackedWeight, torch.Tensor | None]:
    """The table of the block's tokens, and the checkpoint's own embedding, if it has one."""
    own, scale = None, c.input_embedding_scale
    table: torch.Tensor | PackedWeight
    if "embed_tokens.weight" in tensors:
        own = tensors.take("embed_tokens.weight", c.vocab_size, c.hidden_size).contiguous()
        table, scale = own, 1.0 if scale is None else scale
    elif target.hidden_size != c.hidden_size:
        raise ValueError(f"{_WHAT}: tensor embed_tokens.weight must be there, as hidden_size {c.hidden_size} is not "
                         f"the target's {target.hidden_size}; got nothing")
    else:
        table = target.embedding
        if scale is None:  # DFlash2 drafters are trained on the rows as they are stored
            scale = 1.0 if c.conv else target.embedding_scale
    if c.mask_token_id >= table.shape[0]:  # such a row would be read as zeros
        raise ValueError(f"draft config: mask_token_id must be below the {table.shape[0]} rows of embed_tokens.weight; "
                         f"got {c.mask_token_id}")
    if scale == 1.0 and "mask_embedding" not in tensors:
        return table, own
    if isinstance(table, PackedWeight):
        table = embed_tokens(torch.arange(table.out_features, device=target.device), table,
                             out=torch.empty(table.shape, dtype=target.dtype, device=target.device))
    made = table * scale
    if "mask_embedding" in tensors:
        made[c.mask_token_id] = tensors.take("mask_embedding", c.hidden_size) * scale
    return made, own


def read_mask_embedding(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{"mask_embedding": (H,)}, the mask token's row of the embedding, of the file beside the weights; {} if there is
    none. Raises CheckpointError, and NotImplementedError for a pickle."""
    pickle, file = Path(folder) / "mask_embedding.pt", Path(folder) / MASK_EMBEDDING
    if os.path.lexists(file):
        tensors = read_safetensors(file)
        if len(tensors) != 1:
            raise CheckpointError(f"{file}: expected the tensor mask_embedding alone; got {len(tensors)} tensors")
        return {"mask_embedding": next(iter(tensors.values())).flatten()}
    if os.path.lexists(pickle):
        raise NotImplementedError(
            f"{_WHAT}: {pickle.name}, which replaces the mask token's embedding, is a pickle and weights are read from "
            f"safetensors only; store it as the tensor mask_embedding of {MASK_EMBEDDING}")
    return {}


def read_vocabulary(folder: str | os.PathLike) -> torch.Tensor | None:
    """The ids (n,), ascending, of {"token_ids": [id, ...]} in draft_vocabulary.json: the tokens that the drafter was
    trained to draft. None if there is no such file. Raises CheckpointError."""
    file = Path(folder) / "draft_vocabulary.json"
    if not os.path.lexists(file):
        return None
    f = Fields(str(file), read_json(file), error=CheckpointError)
    ids = f.items("token_ids", kind=int, each="distinct token ids")
    if not ids or len(set(ids)) != len(ids) or not all(0 <= i <= MOST for i in ids):
        f.refuse("token_ids", "a list of distinct token ids", ids)
    return torch.tensor(sorted(ids))
