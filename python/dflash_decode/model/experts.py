"""The experts' weights of a checkpoint: each expert's apart, one tensor for all, or in MXFP4. They are read one expert
at a time, so that a checkpoint in memory maps is never in memory twice."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dflash_kernels import PackedExperts, pack_experts, quantize_weight

from .tensors import Tensors

Reader = Callable[[], torch.Tensor]
# The values of 4 bits in MXFP4 (OCP Microscaling Formats 1.0, E2M1); 32 of them share a power of two.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_GROUP, _BIAS = 32, 127


@dataclass(frozen=True)
class Layout:
    """Names in a layer. blocks: of its MLP, as published and as transformers has it. router, correction: within that.
    parts: gate, up and down of one expert. alternating: in tensors of all experts rows of gate and up take turns, and
    inputs come before outputs (gpt-oss)."""

    blocks: tuple[str, ...] = ("mlp",)
    router: str = "gate"
    correction: str = "gate.e_score_correction_bias"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    alternating: bool = False

    def block_of(self, tensors: Tensors, prefix: str) -> str:
        """The prefix of the MLP's tensors: the first that the checkpoint has."""
        places = [f"{prefix}{block}." for block in self.blocks]
        return next((at for at in places if f"{at}{self.router}.weight" in tensors), places[0])


@dataclass(frozen=True)
class Weights:
    gate_up: PackedExperts
    gate_up_bias: torch.Tensor | None
    down: PackedExperts
    down_bias: torch.Tensor | None


class _Lazy(Sequence):
    """Tensors (N, K), each read when it is asked for."""

    def __init__(self, readers: Sequence[Reader]):
        self.readers = readers

    def __len__(self) -> int:
        return len(self.readers)

    def __getitem__(self, index):
        return self.readers[index]()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (read() for read in self.readers)


def take_weights(tensors: Tensors, at: str, layout: Layout, sizes: tuple[int, int, int], bias: bool,
                 int8: bool) -> Weights:
    """sizes: E, H and I. int8: weights in 8 bits, with a scale for each row."""
    (experts, hidden, width), gate_up_bias, down_bias = sizes, None, None
    if f"{at}.gate_up_proj_blocks" in tensors:
        wide, narrow = (_of_mxfp4(tensors, f"{at}.{name}", experts, *shape) for name, shape in (
            ("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))))
    elif f"{at}.gate_up_proj" in tensors or layout.alternating:
        wide, narrow = (_of_all(tensors, f"{at}.{name}", experts, *shape, layout.alternating) for name, shape in (
            ("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))))
    else:
        wide, narrow = _of_each(tensors, at, layout.parts, sizes)
    if layout.alternating:
        wide = [_then(read, _gate_first) for read in wide]
    if bias:
        gate_up_bias = _gate_first(tensors.take(f"{at}.gate_up_proj_bias", experts, 2 * width).T).T.contiguous()
        down_bias = tensors.take(f"{at}.down_proj_bias", experts, hidden).contiguous()
    return Weights(_packed(wide, int8), gate_up_bias, _packed(narrow, int8), down_bias)


def _packed(readers: Sequence[Reader], int8: bool) -> PackedExperts:
    if not int8:
        return pack_experts(_Lazy(readers))
    scales = torch.stack([quantize_weight(weight)[1] for weight in _Lazy(readers)])
    return pack_experts(_Lazy([_then(read, lambda weight: quantize_weight(weight)[0]) for read in readers]), scales)


def _then(read: Reader, change: Callable[[torch.Tensor], torch.Tensor]) -> Reader:
    return lambda: change(read())


def _gate_first(t: torch.Tensor) -> torch.Tensor:
    """Rows gate, up, gate, up ... -> those of gate, then those of up."""
    return torch.cat((t[::2], t[1::2]))


def _of_each(tensors, at, parts, sizes):
    """Tensors of each expert."""
    experts, hidden, width = sizes
    gate, up, down = parts

    def one(e, name, *shape):
        return tensors.later(f"{at}.{e}.{name}.weight", *shape)

    def both(e):
        first, second = one(e, gate, width, hidden), one(e, up, width, hidden)
        return lambda: torch.cat((first(), second()))

    return [both(e) for e in range(experts)], [one(e, down, hidden, width) for e in range(experts)]


def _of_all(tensors, name, experts, n, k, transposed):
    """A tensor of all experts."""
    shape = (experts, k, n) if transposed else (experts, n, k)
    whole = tensors.take_stored(name, *shape)

    def one(e):
        return lambda: tensors.converted(whole[e].T if transposed else whole[e])

    return [one(e) for e in range(experts)]


def _of_mxfp4(tensors, name, experts, n, k):
    """Codes of 4 bits, two in a byte with the first in its lower half, and an exponent for each 32 of a row."""
    if k % _GROUP:
        tensors.refuse(f"{name}_blocks", f"of rows whose {_GROUP}s share an exponent", f"rows of {k}")
    codes = tensors.take_stored(f"{name}_blocks", experts, n, k // _GROUP, _GROUP // 2, dtypes=(torch.uint8,))
    exponents = tensors.take_stored(f"{name}_scales", experts, n, k // _GROUP, dtypes=(torch.uint8,))
    table = torch.tensor(_E2M1)

    def one(e):
        def read():
            both = torch.stack((codes[e] & 15, codes[e] >> 4), -1).flatten(-2)
            wide = torch.ldexp(table[both.int()], exponents[e, ..., None].int() - _BIAS)
            return tensors.converted(wide.flatten(-2))
        return read

    return [one(e) for e in range(experts)]
