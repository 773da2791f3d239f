"""float8_e4m3fn caches: what types.PagedKV says, in plain torch."""

import torch

from ._wide import wide

LARGEST = 448.0


def quantised(rows, scale):
    """rows (..., Hkv, D) as a float8_e4m3fn cache with this scale holds them."""
    x = wide(rows)
    if scale is not None:
        x = x / scale.reshape(-1, 1)
    # torch's own conversion makes NaN of what is too large, and keeps a NaN's sign.
    return torch.where(x.isnan(), float("nan"), x.clamp(-LARGEST, LARGEST)).float().to(torch.float8_e4m3fn)


def dequantised(rows, scale):
    """A float8_e4m3fn cache's rows (..., Hkv, D) as the keys or values that they stand for, float32."""
    return rows.float() if scale is None else rows.float() * scale.reshape(-1, 1)
