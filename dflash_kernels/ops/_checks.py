"""Checks shared by the ops. Each raises with the op's name, what was expected, and what was got."""

import contextlib
import math
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch

from .. import _library
from ..limits import FLOATS as FLOATS
from ..limits import listed
from ..limits import named as named
from ..paged_kv import PagedKV


def values_checked(t: torch.Tensor) -> bool:
    """True when DFLASH_CHECK=1: ops also check values (page ids, positions), which reads the device of t. Not in a
    capture, where nothing can be read: StepGraph refuses to capture then, so that its steps are checked each time."""
    return checking() and t.device.type != "meta" and not _library.capturing()


def checking() -> bool:
    return os.environ.get("DFLASH_CHECK") == "1"


def describe(t: object) -> str:
    if not isinstance(t, torch.Tensor):
        return type(t).__name__
    return f"{named(t.dtype)} {tuple(t.shape)}"


class Checker:
    """The checks of one op's arguments; each returns what it checked. Made once, by the op's module: a call of the op
    allocates none."""

    __slots__ = ("op",)

    def __init__(self, op: str):
        self.op = op

    def floats(self, name: str, t: object, shape: str) -> torch.Tensor:
        """The tensor that decides the dtype of the others; its sizes are left to the op."""
        if not isinstance(t, torch.Tensor) or t.dtype not in FLOATS:
            raise TypeError(f"{self.op}: {name} must be {listed(FLOATS)} {shape}; got {describe(t)}")
        return t

    def tensor(self, name: str, t: object, dtypes: torch.dtype | Collection[torch.dtype], shape: str | tuple,
               sizes: Sequence[int | None], device: torch.device | None = None) -> torch.Tensor:
        """Type, dtype, rank and sizes of one tensor, at any strides. `shape` is its notation for the message, such as
        '(B, Q)'; a size of None is free."""
        dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        if not isinstance(t, torch.Tensor) or t.dtype not in dtypes:
            raise TypeError(f"{self.op}: {name} must be {listed(dtypes)} {shape}; got {describe(t)}")
        if not _fits(t.shape, sizes):
            want = ", ".join("*" if s is None else str(s) for s in sizes)
            raise ValueError(f"{self.op}: {name} must have shape {shape} = ({want}); got {describe(t)}")
        if device is not None and t.device != device:
            raise ValueError(f"{self.op}: {name} must be on {device}; got {t.device}")
        return t

    def dense(self, name: str, t: object, dtypes: torch.dtype | Collection[torch.dtype], shape: str | tuple,
              sizes: Sequence[int | None], device: torch.device | None = None) -> torch.Tensor:
        """A `tensor` that is contiguous in its last dimension; the others may have any strides."""
        return self.dense_last(name, self.tensor(name, t, dtypes, shape, sizes, device))

    def contiguous(self, name: str, t: object, dtypes: torch.dtype | Collection[torch.dtype], shape: str,
                   sizes: Sequence[int | None], device: torch.device | None = None) -> torch.Tensor:
        """A `tensor` that is contiguous."""
        return self.unbroken(name, self.tensor(name, t, dtypes, shape, sizes, device))

    def output(self, name: str, t: torch.Tensor | None, like: torch.Tensor, shape: Sequence[int],
               dtype: torch.dtype | None = None) -> torch.Tensor:
        """The caller's output tensor, dense, or a fresh one."""
        dtype = like.dtype if dtype is None else dtype
        if t is None:
            return torch.empty(tuple(shape), dtype=dtype, device=like.device)
        return self.apart(name, self.dense(name, t, dtype, tuple(shape), shape, like.device))

    def output_beside(self, name: str, t: torch.Tensor | None, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The same, which is not x: rows of x are read after others have been written."""
        written = self.output(name, t, x, shape)
        if t is not None:
            self.other(name, written, "x", x)
        return written

    def contiguous_output(self, name: str, t: torch.Tensor | None, like: torch.Tensor, shape: Sequence[int],
                          dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.unbroken(name, self.output(name, t, like, shape, dtype))

    def dense_last(self, name: str, t: torch.Tensor) -> torch.Tensor:
        if t.dim() and t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"{self.op}: {name} must be contiguous in its last dimension; got strides {t.stride()}")
        return t

    def unbroken(self, name: str, t: torch.Tensor) -> torch.Tensor:
        if not t.is_contiguous():
            raise ValueError(f"{self.op}: {name} must be contiguous; got strides {t.stride()}")
        return t

    def apart(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """What is written must not be an expanded view, whose elements share memory."""
        if 0 in t.stride() and any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"{self.op}: {name} must not be an expanded view; got {describe(t)} "
                             f"with strides {t.stride()}")
        return t

    def other(self, name: str, t: torch.Tensor, of: str, x: torch.Tensor) -> None:
        """t must not begin where x does. Whether a compiled graph's tensors do cannot be known when it is made."""
        same = t is x
        if not (same or torch.compiler.is_compiling() or "meta" in (t.device.type, x.device.type)):
            with contextlib.suppress(RuntimeError):  # a fake tensor has no memory
                same = t.numel() > 0 and t.data_ptr() == x.data_ptr()
        if same:
            raise ValueError(f"{self.op}: {name} must not be {of}; got the same tensor")

    def as_rows(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """A (..., N) tensor as (rows, N) without a copy."""
        self.dense_last(name, t)
        if t.dim() == 2:
            return t
        try:
            return t.view(-1, t.shape[-1]) if t.numel() else t.new_empty((0, t.shape[-1]))
        except RuntimeError:
            raise ValueError(f"{self.op}: {name} must flatten to rows without a copy; got {describe(t)} "
                             f"with strides {t.stride()}") from None

    def integer(self, name: str, value: Any, minimum: int) -> int:
        """One whole number that the host knows."""
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{self.op}: {name} must be an int; got {describe(value)}")
        if value < minimum or value >= 2**63:
            bound = f"at least {minimum}" if value < minimum else "below 2**63"
            raise ValueError(f"{self.op}: {name} must be {bound}; got {value}")
        return value  # type: ignore[return-value]  # a SymInt is an int to whoever calls

    def number(self, name: str, value: Any) -> float:
        """One real number that the host knows."""
        if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{self.op}: {name} must be a number; got {describe(value)}")
        return float(value)

    def scales(self, name: str, cache: PagedKV) -> None:
        """Reads the device: only under DFLASH_CHECK=1. Dividing by 0, or by less than nothing, is a scale never set."""
        for which, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
            if scale is not None and not ((scale > 0) & (scale < math.inf)).all():
                raise ValueError(f"{self.op}: {name}.{which} must be finite and above 0; got {scale.tolist()}")


def _fits(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    if len(shape) != len(sizes):
        return False
    for want, got in zip(sizes, shape, strict=True):  # noqa: SIM110  a generator would take longer than the rest
        if want is not None and want != got:
            return False
    return True
