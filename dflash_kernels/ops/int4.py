"""4-bit checkpoints, as AWQ and GPTQ store them, made into rows of blocks that `pack_weight` takes.

    W[n, k] = scale[g, n] * (code[k, n] - zero[g, n])        g = k // 128, float16 scales

Codes, scales and zero points are kept as they are; only their places change.
"""

import torch

from .. import reference
from ..limits import check_group_order, named
from ._checks import Checker

_awq_check = Checker("awq_blocks")
_gptq_check = Checker("gptq_blocks")


def awq_blocks(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Rows of blocks of a linear layer in AWQ's layout (`"quant_method": "awq"`, version "gemm").

    Parameters
    ----------
    qweight : (K, N / 8) int32
        Eight codes of a row in each, K a multiple of 128.
    qzeros : (K / 128, N / 8) int32
        Zero points, packed as qweight.
    scales : (K / 128, N) float16 or bfloat16
        Finite, and numbers of float16.

    Returns
    -------
    rows : (N, bytes of a row) uint8
    format : str
        "uint4_g128", for `pack_weight` on a GPU.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape or device, as of groups other than 128, or scales that float16 does not have.

    Notes
    -----
    Not graph-safe: it allocates, and reads the device. Source: reference/int4.py; Lin et al., AWQ, arXiv 2306.00978.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import awq_blocks
    >>> codes, zeros = torch.zeros(128, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    >>> rows, format = awq_blocks(codes, zeros, torch.ones(1, 8, dtype=torch.float16))
    >>> rows.shape, format
    (torch.Size([8, 67]), 'uint4_g128')
    """
    check = _awq_check
    check.tensor("qweight", qweight, torch.int32, "(K, N / 8)", (None, None))
    _check_groups(check, qweight.shape[0], qweight.shape[1] * 8, qzeros, scales, qweight.device)
    return reference.int4.awq_blocks(qweight, qzeros, scales), "uint4_g128"


def gptq_blocks(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None,
                *, version: int = 1) -> tuple[torch.Tensor, str]:
    """Rows of blocks of a linear layer in GPTQ's layout (`"quant_method": "gptq"`).

    Parameters
    ----------
    qweight : (K / 8, N) int32
        Eight codes of a column in each, K a multiple of 128.
    qzeros : (K / 128, N / 8) int32
        Eight zero points of a row in each.
    scales : (K / 128, N) float16 or bfloat16
        Finite, and numbers of float16.
    g_idx : (K,) int32, optional
        The group of each k, which must be k // 128. None: it is.
    version : {1, 2}
        1: a zero point is stored less one ("checkpoint_format": "gptq"). 2: as it is ("gptq_v2").

    Returns
    -------
    rows : (N, bytes of a row) uint8
    format : str
        For `pack_weight` on a GPU. "int4_g128" if all zero points are 8, as of symmetric checkpoints, else
        "uint4_g128".

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, device or version, as of groups other than 128, or scales that float16 does not have.
    NotImplementedError
        Groups in another order ("desc_act").

    Notes
    -----
    Not graph-safe: it allocates, and reads the device. Source: reference/int4.py; Frantar et al., GPTQ,
    arXiv 2210.17323.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import gptq_blocks
    >>> codes, zeros = torch.zeros(16, 8, dtype=torch.int32), torch.full((1, 1), 0x77777777, dtype=torch.int32)
    >>> rows, format = gptq_blocks(codes, zeros, torch.ones(1, 8, dtype=torch.float16))
    >>> rows.shape, format
    (torch.Size([8, 66]), 'int4_g128')
    """
    check = _gptq_check
    check.tensor("qweight", qweight, torch.int32, "(K / 8, N)", (None, None))
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    _check_groups(check, k, n, qzeros, scales, qweight.device)
    if isinstance(version, bool) or not isinstance(version, int) or version not in (1, 2):
        raise ValueError(f"{check.op}: version must be 1 or 2; got {version!r}")
    if g_idx is not None:
        check.tensor("g_idx", g_idx, torch.int32, "(K,)", (k,), qweight.device)
        other = g_idx != torch.arange(k, dtype=torch.int32, device=g_idx.device) // reference.int4.GROUP
        if g_idx.device.type != "meta" and bool(other.any()):
            at = int(other.nonzero()[0, 0])
            check_group_order(check.op, at, int(g_idx[at]))
    rows = reference.int4.gptq_blocks(qweight, qzeros, scales, 2 - version)
    return rows, "int4_g128" if rows.shape[1] * reference.int4.GROUP == 66 * k else "uint4_g128"


def _check_groups(check: Checker, k: int, n: int, qzeros: torch.Tensor, scales: torch.Tensor,
                  device: torch.device) -> None:
    if k == 0 or n == 0 or k % reference.int4.GROUP or n % 8:
        raise ValueError(f"{check.op}: qweight must be of K, a multiple of 128, and N, a multiple of 8; got K = {k}, "
                         f"N = {n}")
    check.tensor("qzeros", qzeros, torch.int32, "(K / 128, N / 8)", (k // reference.int4.GROUP, n // 8), device)
    check.tensor("scales", scales, (torch.float16, torch.bfloat16), "(K / 128, N)", (k // reference.int4.GROUP, n),
                 device)
    wrong = (scales.half().float() != scales.float()) | ~scales.half().isfinite()
    if device.type != "meta" and bool(wrong.any()):
        raise ValueError(f"{check.op}: scales must be finite numbers of float16; got "
                         f"{float(scales[tuple(wrong.nonzero()[0])]):g} in {named(scales.dtype)}")
