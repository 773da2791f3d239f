"""DFlashGroupedConv._convolve -> grouped_conv: before and after each attention and MLP of a DFlash2 drafter.

The engine compiles its convolution, which then sums in float32 and rounds once, as ours does.
"""

import torch

from ..dflash2 import convolve
from ..hooks import LEFT, Hook


def _convolve(self, hidden_states, delta, side):
    if torch.compiler.is_compiling():  # it goes on as part of the graph
        return LEFT
    found = convolve(hidden_states, delta, self.base_kernel[side], self.block_size)
    return LEFT if found is None else found


MODEL = "sglang.srt.models.dflash"
HOOK = Hook("grouped_conv", f"{MODEL}:DFlashGroupedConv._convolve", _convolve,
            read={"0.5.23": "85dae0b015f998d4"}, diverges=True, beside=(f"{MODEL}:_grouped_conv",))
