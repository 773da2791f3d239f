"""dflash2_grouped_conv -> grouped_conv, for DFlash2 drafters. vLLM's V2 runner.

The model is compiled as one graph, in which the convolution is an operator of torch's. What is replaced is therefore
the operator's implementation: the graph, and what it was compiled to, stay.
Both kernels sum in float32 and round once. Theirs multiplies the sum of both coefficients, ours each by itself, so that
a result may be the neighbouring number.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..dflash2 import convolve
from ..hooks import LEFT, Hook

LIBRARIES: list[torch.library.Library] = []  # an implementation is there as long as its library


def dflash2_grouped_conv_impl(x, delta, base, block_size, group_size):
    if group_size * delta.shape[-1] != x.shape[-1]:
        return LEFT
    found = convolve(x, delta, base, block_size)
    return LEFT if found is None else found


def place(_target: str, owner: Any, attribute: str, _original: Callable, replacement: Callable) -> None:
    from vllm.platforms import current_platform

    library = torch.library.Library("vllm", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is there already
        library.impl("dflash2_grouped_conv", replacement, current_platform.dispatch_key, allow_override=True)
    LIBRARIES.append(library)
    setattr(owner, attribute, replacement)


MODEL = "vllm.model_executor.models.qwen3_dflash2"
HOOK = Hook("grouped_conv", f"{MODEL}:dflash2_grouped_conv_impl", dflash2_grouped_conv_impl,
            read={"0.32.0": "303ecd8702586157", "0.33.0": "303ecd8702586157"}, place=place,
            diverges=True,
            beside=(f"{MODEL}:_dflash2_grouped_conv_kernel", f"{MODEL}:_grouped_conv"))
