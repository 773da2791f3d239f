"""Weights in the blocks of a GGUF file."""

from dataclasses import dataclass

import torch

from dflash_kernels import formats

# Elements and bytes of a block of each format that the ops have; other formats are expanded.
FORMATS = {name: (f.block, f.bytes) for name, f in formats.FORMATS.items()}


@dataclass(frozen=True)
class Blocks:
    """A weight (N, K) as a GGUF file stores it: `data` (N, bytes of a row) uint8, in the blocks of `format`."""

    data: torch.Tensor
    format: str

    @property
    def shape(self) -> tuple[int, int]:
        elements, nbytes = FORMATS[self.format]
        return self.data.shape[0], self.data.shape[1] // nbytes * elements

    @property
    def nbytes(self) -> int:
        return self.data.nbytes
