"""Weights in the blocks of a GGUF file."""

from dataclasses import dataclass

import torch

from dflash_kernels.formats import FORMATS


@dataclass(frozen=True)
class Blocks:
    """A weight (N, K) as a GGUF file stores it: `data` (N, bytes of a row) uint8, in the blocks of `format`."""

    data: torch.Tensor
    format: str

    @property
    def shape(self) -> tuple[int, int]:
        f = FORMATS[self.format]
        return self.data.shape[0], self.data.shape[1] // f.bytes * f.block

    @property
    def nbytes(self) -> int:
        return self.data.nbytes
