"""Error budgets: how far a kernel can be from its reference."""

import torch


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shapes, dtypes and every bit agree.

    Parameters
    ----------
    a, b : torch.Tensor
        Any dtype of 1, 2, 4 or 8 bytes.

    Returns
    -------
    same : bool
        NaN equals NaN with the same bits, and 0.0 differs from -0.0.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels.testing import same_bits
    >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
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
    """Float64 copies of float tensors: inputs for a reference whose result all dtypes are measured against.

    Parameters
    ----------
    *tensors : torch.Tensor or None
        Tensors of other dtypes are cloned. None stays None.

    Returns
    -------
    copies : tuple

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels.testing import doubles
    >>> x, ids, none = doubles(torch.ones(2, dtype=torch.bfloat16), torch.tensor([3]), None)
    >>> x.dtype, ids.dtype, none
    (torch.float64, torch.int64, None)
    """
    return tuple(None if t is None else t.double() if t.is_floating_point() else t.clone() for t in tensors)


def assert_within_budget(actual: torch.Tensor, reference: torch.Tensor, peer: torch.Tensor | None = None, *,
                         factor: float = 2.0, ulps: float = 1.0, name: str = "") -> None:
    """Asserts |actual - reference| <= factor * max|peer - reference| + ulps * ulp(reference), element by element.

    Parameters
    ----------
    actual : torch.Tensor
        The result under test.
    reference : torch.Tensor, float32 or float64
        The truth, of the same shape.
    peer : torch.Tensor, optional
        The same expression in torch at actual's dtype. None: the budget is ulps alone.
    factor : float
        Allowed multiple of the peer's largest error.
    ulps : float
        Allowed units in the last place of actual's dtype.
    name : str
        Prefix of the message.

    Raises
    ------
    AssertionError
        An element is over the budget, or NaN and infinities stand at other places. The message has the first
        coordinate.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels.testing import assert_within_budget
    >>> truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> assert_within_budget(truth.bfloat16(), truth)
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
