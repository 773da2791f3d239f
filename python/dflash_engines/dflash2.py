"""What both engines' hooks for DFlash2 share. Their tensors have the same form."""

from typing import Any

import torch

from dflash_kernels import grouped_conv, supports

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def convolve(x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, block: int) -> torch.Tensor | None:
    """x (T, H), delta (T, t, G), base (t, H): the convolution of all requests' blocks, (T, H), rounded once. None where
    the tensors have another form, such as rows padded to a number that is not one of whole blocks."""
    if x.dim() != 2 or delta.dim() != 3 or base.dim() != 2:
        return None
    (rows, hidden), (taps, groups) = x.shape, delta.shape[1:]
    if (rows < 1 or block < 1 or rows % block or delta.shape[0] != rows or base.shape != (taps, hidden)
            or not groups or hidden % groups or not x.dtype == delta.dtype == base.dtype or x.dtype not in FLOATS
            or x.stride(1) != 1 or delta.stride(2) != 1 or not base.is_contiguous()):
        return None
    return grouped_conv(x.unflatten(0, (-1, block)), delta.unflatten(0, (-1, block)), base).flatten(0, 1)


def uncovered(selector: Any) -> str | None:
    """Why select_candidates cannot take an engine's CandidateSelector, or None."""
    tables = selector.predecessor_codebook, selector.successor_codebook
    dtypes = {tables[0].dtype, tables[1].dtype, selector.hidden_projection.weight.dtype}
    if len(dtypes) > 1 or not dtypes <= {*FLOATS}:
        return f"a selector of {', '.join(sorted(map(str, dtypes)))}"
    if not all(table.is_contiguous() for table in tables):
        return "codebooks that are not contiguous"
    return supports("select_candidates", k=selector.top_k).reason or None


def selectable(ids: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether candidates (B, drafts, K) and hidden states (B, drafts, H) have the expected form."""
    return (ids.dim() == hidden.dim() == 3 and ids.shape == values.shape and hidden.shape[:2] == ids.shape[:2]
            and ids.dtype == torch.int64 and values.dtype == torch.float32
            and ids.is_contiguous() and values.is_contiguous())
