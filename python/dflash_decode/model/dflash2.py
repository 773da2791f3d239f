"""What DFlash2 adds to a drafter: a convolution before and after each attention and MLP, and a selector of candidates.

    h = norm(x);  own = projection(h);  h = conv(h, own[0]);  x += conv(attention or MLP of h, own[1])

The projection of a sublayer's normed input gives the coefficients of both convolutions. The second one is fused with
the addition and the norm that follow it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dflash_kernels import PackedWeight, grouped_conv, grouped_conv_add_rms_norm, linear

from ..checkpoint.errors import CheckpointError
from ..checkpoint.safetensors import read_safetensors
from .config import Convolution, DraftConfig
from .markov import take_markov
from .tensors import Packer, Tensors

# Names of a selector's tensors.
PREFIX, NAMES = "candidate_selector.", ("predecessor_codebook", "successor_codebook", "hidden_projection.weight")
_BOOKS, _HIDDEN = NAMES[:2], NAMES[2]


@dataclass(frozen=True)
class Conv:
    """base (2, taps, H): of the convolution before the sublayer, and of the one after it."""

    base: torch.Tensor
    projection: PackedWeight


@dataclass(frozen=True)
class CandidateSelector:
    """Codebooks (V, rank) by the target's ids. projection: of the drafter's hidden states; None in a Markov head."""

    predecessor: torch.Tensor
    successor: torch.Tensor
    projection: PackedWeight | None


def take_conv(tensors: Tensors, name: str, hidden: int, conv: Convolution, pack: Packer) -> Conv:
    base = tensors.take(f"{name}.base_kernel", 2, conv.taps, hidden).contiguous()
    rows = 2 * conv.taps * (hidden // conv.group)
    return Conv(base, pack(tensors.take(f"{name}.kernel_projection.weight", rows, hidden)))


def take_selector(tensors: Tensors, c: DraftConfig, pack: Packer, ids_of_draft: torch.Tensor | None,
                  ) -> CandidateSelector | None:
    """ids_of_draft (rows,): the target's ids of the draft head's rows; None: their numbers."""
    if c.selector is None:
        return None
    if c.selector.markov:
        return CandidateSelector(*take_markov(tensors, c.vocab_size, c.draft_vocab_size, c.selector.rank, ids_of_draft),
                                 None)
    predecessor, successor = (
        tensors.take(PREFIX + name, c.vocab_size, c.selector.rank).contiguous() for name in _BOOKS)
    hidden = tensors.take(PREFIX + _HIDDEN, c.selector.rank, c.hidden_size)
    return CandidateSelector(predecessor, successor, pack(hidden))


# A selector that was trained for a drafter without one. Engines that load every file beside the weights do not see it.
FILE = Path("candidate_selector", "model.safetensors")


def write_selector(folder: Path, predecessor: torch.Tensor, successor: torch.Tensor, hidden: torch.Tensor,
                   candidates: int) -> Path:
    """predecessor, successor (n, rank): one row a token of the draft vocabulary. hidden (rank, H)."""
    from safetensors.torch import save_file  # here: reading a drafter's config needs no such package

    file = folder / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(zip(NAMES, (predecessor, successor, hidden), strict=True))
    save_file({PREFIX + name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}
              | {"candidates": torch.tensor([candidates])}, file)
    return file


def read_selector(folder: str | os.PathLike, vocabulary: torch.Tensor | None, vocab_size: int,
                  ) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The selector in candidate_selector/ beside a drafter's weights, as what a checkpoint with one has of it: tensors,
    and fields of the config. Empty if there is no such file. Raises CheckpointError.

    vocabulary (n,): the tokens of the codebooks' rows; None: all.
    """
    file = Path(folder) / FILE
    if not os.path.lexists(file):
        return {}, {}
    tensors = read_safetensors(file)
    wanted = {*(PREFIX + name for name in NAMES), "candidates"}
    if tensors.keys() != wanted:
        raise CheckpointError(f"{file}: tensors must be {', '.join(sorted(wanted))}; got {', '.join(sorted(tensors))}")
    count = tensors.pop("candidates")
    if count.numel() != 1 or count.is_floating_point():
        raise CheckpointError(f"{file}: candidates must be one integer; got {tuple(count.shape)} of {count.dtype}")
    hidden = tensors[PREFIX + _HIDDEN]
    if hidden.dim() != 2:
        raise CheckpointError(f"{file}: {PREFIX + _HIDDEN} must be (rank, hidden_size); got {tuple(hidden.shape)}")
    if vocabulary is not None and int(vocabulary.max()) >= vocab_size:
        return {}, {}  # which the drafter refuses
    rows, rank = vocab_size if vocabulary is None else len(vocabulary), hidden.shape[0]
    for name in _BOOKS:
        book = tensors[PREFIX + name]
        if tuple(book.shape) != (rows, rank):
            raise CheckpointError(f"{file}: {PREFIX + name} must be ({rows}, {rank}), a row for each token of the "
                                  f"draft vocabulary; got {tuple(book.shape)}")
        if vocabulary is not None:
            tensors[PREFIX + name] = book.new_zeros(vocab_size, rank).index_copy_(0, vocabulary, book)
    return tensors, {"selector_rank": rank, "selector_top_k": int(count)}


class ConvMemory:
    """Both convolutions of one sublayer after the other, over B blocks of Q rows, in memory of their own."""

    def __init__(self, conv: Convolution, batch: int, width: int, like: torch.Tensor):
        """like: a tensor (..., H) with the dtype and device of the rows."""
        hidden = like.shape[-1]
        self.blocks = (batch, width, hidden)
        self.own = like.new_zeros(batch, width, 2, conv.taps, hidden // conv.group)
        self.before = like.new_zeros(batch * width, hidden)

    def start(self, conv: Conv, normed: torch.Tensor) -> torch.Tensor:
        """The sublayer's input (T, H) from its normed rows; keeps the coefficients of the convolution after it."""
        linear(normed, conv.projection, out=self.own.view(len(normed), -1))
        grouped_conv(normed.view(self.blocks), self.own[:, :, 0], conv.base[0], out=self.before.view(self.blocks))
        return self.before

    def finish(self, conv: Conv, added: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
               out: torch.Tensor, residual_out: torch.Tensor | None) -> None:
        """out = norm(residual + conv(added)) (T, H); the sum goes to residual_out, or in place of residual."""
        grouped_conv_add_rms_norm(
            added.view(self.blocks), self.own[:, :, 1], conv.base[1], residual.view(self.blocks), weight, eps,
            out=out.view(self.blocks), residual_out=None if residual_out is None else residual_out.view(self.blocks))
