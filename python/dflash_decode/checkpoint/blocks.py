"""Weights in the blocks of a GGUF file."""

from dataclasses import dataclass

import torch

# Elements and bytes of a block of each format that the ops have; other formats are expanded.
FORMATS = {"q4_0": (32, 18), "q4_1": (32, 20), "q8_0": (32, 34), "q4_k": (256, 144), "q5_k": (256, 176),
           "q6_k": (256, 210)}


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
