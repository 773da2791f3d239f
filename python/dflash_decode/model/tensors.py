"""A checkpoint's tensors on their way into layers: taken by name, checked, and packed for products."""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch

from dflash_kernels import PackedWeight, linear, pack_weight, quantize_blocks, quantize_weight

from ..checkpoint.blocks import Blocks

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Tensors:
    """A checkpoint's tensors, taken one by one with their shapes checked. A tensor that is never taken is an error."""

    def __init__(self, tensors: Mapping[str, torch.Tensor | Blocks], dtype: torch.dtype, device: torch.device,
                 what: str):
        self._tensors, self._dtype, self._device, self._what = tensors, dtype, device, what
        self._left = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Takes a weight of any float dtype and converts it, to the checkpoint's `dtype` if there is none here."""
        return self._take(name, shape, _FLOATS).to(self._device, dtype or self._dtype)

    def later(self, name: str, *shape: int) -> Callable[[], torch.Tensor]:
        """Takes a weight that must be there, and is read, checked and converted in each call of the result."""
        self._claim(name, shape)
        return lambda: self.converted(self._read(name, shape, _FLOATS))

    def take_stored(self, name: str, *shape: int, dtypes: Sequence[torch.dtype] = _FLOATS) -> torch.Tensor:
        """Takes a tensor as it is stored, which may be a map of a file."""
        return self._take(name, shape, dtypes)

    def converted(self, t: torch.Tensor) -> torch.Tensor:
        """A part of a stored tensor, in `dtype`."""
        return t.to(self._device, self._dtype)

    def take_weight(self, name: str, *shape: int) -> torch.Tensor | Blocks:
        """Takes a weight of products: as `take` does, or in its blocks."""
        self._claim(name, shape)
        t = self._read(name, shape, _FLOATS, blocks=True)
        return t if isinstance(t, Blocks) else t.to(self._device, self._dtype)

    def take_ids(self, name: str, *shape: int) -> torch.Tensor:
        """Takes integers and converts them to int64."""
        return self._take(name, shape, _INTEGERS).to(self._device, torch.int64)

    def refuse(self, name: str, expected: str, got: str) -> NoReturn:
        """Raises the error that the tensor must be as expected."""
        raise ValueError(f"{self._what}: tensor {name} must be {expected}; got {got}")

    def _claim(self, name, shape):
        if name not in self._left:
            self.refuse(name, f"there with shape {shape}", "nothing")
        self._left.remove(name)

    def _take(self, name, shape, dtypes):
        self._claim(name, shape)
        return self._read(name, shape, dtypes)

    def _read(self, name, shape, dtypes, blocks=False):
        t = self._tensors[name]
        if tuple(t.shape) != shape:
            raise ValueError(f"{self._what}: tensor {name} must have shape {shape}; got {tuple(t.shape)}")
        if isinstance(t, Blocks) and not blocks:
            self.refuse(name, "of elements", f"blocks of {t.format}")
        if not isinstance(t, Blocks) and t.dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            self.refuse(name, f"one of {names}", str(t.dtype).removeprefix("torch."))
        return t

    def drop(self, *endings: str) -> None:
        """Ignores tensors that carry no new information."""
        self._left = {name for name in self._left if not name.endswith(endings)}

    def drop_under(self, *prefixes: str) -> None:
        """Ignores tensors of parts that are not used."""
        self._left = {name for name in self._left if not name.startswith(prefixes)}

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"{self._what}: tensor {sorted(self._left)[0]} must not be there (its config has no place "
                             f"for it); got {len(self._left)} such tensors")


Packer = Callable[[torch.Tensor | Blocks], PackedWeight]


def packer(int8: bool, exact: bool = False) -> Packer:
    """The packing of weights: in their blocks, in their dtype, or in 8 bits; on a CPU with a scale for 32 elements, so
    that rows of products become int8 too, elsewhere with one per row. exact: whether a file's blocks are multiplied as
    the elements that they stand for."""
    def pack(weight: torch.Tensor | Blocks) -> PackedWeight:
        if isinstance(weight, Blocks):
            return pack_weight(weight.data, format=weight.format, exact=exact)
        if int8 and weight.device.type == "cpu" and weight.shape[1] % 32 == 0:
            return pack_weight(quantize_blocks(weight, "q8_0"), format="q8_0")
        return pack_weight(*quantize_weight(weight)) if int8 else pack_weight(weight)

    return pack


class Weight:
    """A weight whose rows come from several tensors, one below the other. Those of one format are one product."""

    def __init__(self, pack: Packer, *parts: torch.Tensor | Blocks):
        groups: list[list[torch.Tensor | Blocks]] = []
        for part in parts:
            if groups and _kind(groups[-1][0]) == _kind(part):
                groups[-1].append(part)
            else:
                groups.append([part])
        self.parts = [pack(_below(group)) for group in groups]

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = linear(x), with the bias of all rows."""
        if len(self.parts) == 1:
            linear(x, self.parts[0], bias, out=out)
            return
        at = 0
        for part in self.parts:
            to = slice(at, at := at + part.out_features)
            linear(x, part, None if bias is None else bias[to], out=out[:, to])


def _kind(part: torch.Tensor | Blocks) -> str | None:
    return part.format if isinstance(part, Blocks) else None


def _below(parts: Sequence[torch.Tensor | Blocks]) -> torch.Tensor | Blocks:
    """Tensors of one kind as one."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.cat([part.data if isinstance(part, Blocks) else part for part in parts])
    return Blocks(rows, parts[0].format) if isinstance(parts[0], Blocks) else rows
