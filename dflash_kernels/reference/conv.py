"""The grouped dynamic convolution of a block. Roundings by their numbers: 0 "end", 1 "reference", 2 "engine"."""

import torch

from ._wide import wide
from .norm import add_rms_norm


def _convolved(x, delta, base, block, rounding):
    """x (T, H) in blocks of `block` rows, delta (T, t, G), base (t, H)."""
    rows, taps = wide(x), delta.shape[1]
    place = torch.arange(len(x), device=x.device) % block
    spread = wide(delta).repeat_interleave(x.shape[1] // delta.shape[2], dim=-1)

    def rounded(values):
        return wide(values.to(x.dtype))

    total = torch.zeros_like(rows)
    for tap in range(min(taps, block)):
        # Rows that the tap would take from another block are left out, whatever is there.
        live = place >= tap
        earlier = torch.where(live[:, None], rows.roll(tap, 0), 0.0)
        fixed, own = wide(base[tap]), spread[:, tap]
        if rounding == 0:
            added = total + fixed * earlier + own * earlier
        elif rounding == 1:
            added = rounded(rounded(total + rounded(fixed * earlier)) + own * earlier)
        else:
            added = rounded(total + rounded(rounded(fixed + own) * earlier))
        total = torch.where(live[:, None], added, total)
    return total.to(x.dtype)


def grouped_conv(x, delta, base, block, rounding, out):
    out.copy_(_convolved(x, delta, base, block, rounding))


def grouped_conv_add_rms_norm(x, delta, base, block, rounding, residual, weight, eps, out, residual_out):
    add_rms_norm(_convolved(x, delta, base, block, rounding), residual, weight, eps, out, residual_out)
