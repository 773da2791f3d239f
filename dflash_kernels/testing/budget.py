"""How far a kernel may be from the float32 reference."""

import torch


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True when shapes, dtypes and every bit agree (so NaN equals the same NaN, and 0.0 differs from -0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of `dtype` at each value of the tensor x."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


def doubles(*tensors):
    """Float64 copies: what a reference is given to produce the truth that all dtypes are measured against."""
    return tuple(None if t is None else t.double() if t.is_floating_point() else t.clone() for t in tensors)


def assert_within_budget(actual: torch.Tensor, reference: torch.Tensor, peer: torch.Tensor | None = None, *,
                         factor: float = 2.0, ulps: float = 1.0, name: str = "") -> None:
    """|actual - reference| <= factor * max|peer - reference| + ulps * ulp(reference), element by element.

    reference: float32 or float64, same shape. peer: the same expression in torch at actual's dtype, or None for ulps
    alone. NaN and infinities must stand at the same places. The first bad coordinate is in the message.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(reference.shape)}"
    got, want = actual.double(), reference.double()
    for what, f in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = f(got) != f(want.to(actual.dtype).double())
        assert not wrong.any(), f"{name}: {what} differs first at {wrong.nonzero()[0].tolist()}"
    finite = torch.isfinite(want) & torch.isfinite(got)
    want = torch.where(finite, want, 0.0)
    error = torch.where(finite, (got - want).abs(), 0.0)
    allowed = ulps * ulp(want, actual.dtype)
    if peer is not None:
        gap = torch.where(finite & torch.isfinite(peer.double()), (peer.double() - want).abs(), 0.0)
        allowed = allowed + factor * (gap.max() if gap.numel() else 0.0)
    bad = error > allowed
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(f"{name}: {int(bad.sum())} of {bad.numel()} elements are over the budget; first at {at}: "
                             f"got {got[at].item():.9g}, reference {want[at].item():.9g}, "
                             f"error {error[at].item():.3g} > {allowed[at].item():.3g}")
