"""Checkpoints stored in 8 bits, or in NVFP4: the weights in the model's dtype, value = scale * (stored - zero point).

NVFP4 has two numbers of 4 bits (1 of sign, 2 of exponent, 1 of mantissa) in a byte, the first in its lower half, a
scale in fp8 e4m3 for 16 of them, and one more for the tensor: ModelOpt's is a factor, compressed-tensors' a divisor.

A format that also rounds activations (W8A8, W4A4) is run without that, so that an engine's output can differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.fields import Fields, shown

_METHODS = ("compressed-tensors", "fp8", "modelopt")
_STORED = (torch.float8_e4m3fn, torch.int8)
_SCALES = ("_scale", "_scale_inv")
# Beside a weight, or of it: for activations, for an engine's cache in 8 bits, or with the scales already.
_UNUSED = (".activation_scale", ".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale",
           ".q_scale", ".kv_cache_scale", ".input_global_scale")
_FOUR_BITS = (".weight_packed", ".qweight", ".weight_scale_2")
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_NVFP4_GROUP = 16
_NVFP4_AT_ONCE = 1 << 22  # numbers that are widened together
_NVFP4_SCALES = ("_scale_2", "_global_scale")  # ModelOpt's, compressed-tensors'
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Quantization:
    """block: the rows and columns of a weight that share a scale, where the config has them. nvfp4: weights in uint8
    are of that format."""

    block: tuple[int, int] | None = None
    nvfp4: bool = False


def read_quantization(config: Fields) -> Quantization | None:
    """The quantization_config of a model in 8 bits or NVFP4, or None. Raises NotImplementedError for any other."""
    found = config.table("quantization_config", None)
    if not found:
        return None
    f = Fields(f"{config.what}: quantization_config", found)
    if f.get("quant_method") not in _METHODS:
        raise NotImplementedError(f"{f.what}.quant_method must be one of {', '.join(_METHODS)}; "
                                  f"got {shown(f.get('quant_method'))}")
    if f.get("quant_algo", "FP8") not in ("FP8", *_NVFP4):
        raise NotImplementedError(f"{f.what}.quant_algo must be one of FP8, {', '.join(_NVFP4)}; "
                                  f"got {shown(f.get('quant_algo'))}")
    groups = f.table("config_groups", {})
    places = [found, *(group for group in groups.values() if isinstance(group, Mapping))]
    for place in places:
        if place.get("format") == "pack-quantized":
            raise NotImplementedError(f"{f.what}.format = 'pack-quantized', several numbers in one, is not supported")
    nvfp4 = f.get("quant_algo") in _NVFP4 or any(place.get("format") == "nvfp4-pack-quantized" for place in places)
    if f.get("transform_config"):
        raise NotImplementedError(f"{f.what}.transform_config, which rotates activations, is not supported; "
                                  f"got {shown(f.get('transform_config'))}")
    block: Sequence[int] | None = f.items("weight_block_size", None, int, "two numbers")
    for name, group in groups.items():
        weights = Fields(f"{f.what}.config_groups.{name}.weights", Fields(f.what, group).table("weights", {}))
        bits = weights.whole("num_bits", 8)
        if nvfp4 and bits == 4:
            if weights.whole("group_size", _NVFP4_GROUP, least=-1) != _NVFP4_GROUP:
                weights.refuse("group_size", f"{_NVFP4_GROUP} in NVFP4", weights.get("group_size"))
            continue
        if bits != 8:
            raise NotImplementedError(f"{weights.what}.num_bits must be 8; got {bits}")
        size = weights.whole("group_size", 0, least=-1)
        block = block or weights.items("block_structure", None, int, "two numbers") or ([1, size] if size > 0 else None)
    if block is not None and (len(block) != 2 or min(block) < 1):
        f.refuse("weight_block_size (or block_structure)", "two numbers of at least 1", block)
    return Quantization(None if block is None else (block[0], block[1]), nvfp4)


def dequantized(config: Quantization | None, tensors: Mapping[str, Any], dtype: torch.dtype,
                what: str) -> Mapping[str, Any]:
    """The tensors with every weight of 8 bits or NVFP4 in `dtype`, each made when it is read; no config changes
    nothing. what: names the checkpoint in errors. Raises NotImplementedError for other weights in 4 bits."""
    if config is None:
        return tensors
    four_bits = (".qweight",) if config.nvfp4 else _FOUR_BITS
    if packed := sorted(name for name in tensors if name.endswith(four_bits)):
        raise NotImplementedError(f"{what}: tensor {packed[0]}, a weight in 4 bits, is not supported")
    return _Widened(config, tensors, dtype, what)


class _Widened(Mapping):
    """Reading raises ValueError for a weight without a scale or with one of another shape."""

    def __init__(self, config: Quantization, tensors: Mapping[str, Any], dtype: torch.dtype, what: str):
        self._block, self._tensors, self._dtype, self._what = config.block, tensors, dtype, what
        # The name of a weight in NVFP4 -> the one that it is stored by.
        self._nvfp4 = {name.removesuffix("_packed"): name for name in tensors if config.nvfp4 and (
            name.endswith(".weight_packed") or f"{name}_scale_2" in tensors)}
        held = dict.fromkeys((*tensors, *self._nvfp4))
        beside = (*_SCALES, "_zero_point", *_NVFP4_SCALES, "_packed")
        self._names = {name: None for name in held if not name.endswith(_UNUSED) and not any(
            name.endswith(end) and name.removesuffix(end) in held for end in beside)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Any:
        if name in self._nvfp4:
            return self._of_nvfp4(name, self._tensors[self._nvfp4[name]])
        t = self._tensors[name]
        if not isinstance(t, torch.Tensor) or t.dtype not in _STORED:
            return t
        scale = next((self._tensors[name + end] for end in _SCALES if name + end in self._tensors), None)
        if scale is None:
            raise ValueError(f"{self._what}: tensor {name}_scale must be there, as {name} is stored in 8 bits; "
                             "got nothing")
        zero = self._tensors.get(f"{name}_zero_point")
        exact = t.float() if zero is None else t.float() - self._spread(name, zero.float(), t.shape)
        return (exact * self._spread(name, self._factors(name, scale), t.shape)).to(self._dtype)

    def _of_nvfp4(self, name, t):
        scale = self._tensors.get(f"{name}_scale")
        whole = next((self._tensors[name + end] for end in _NVFP4_SCALES if name + end in self._tensors), None)
        groups = (t.shape[0], 2 * t.shape[-1] // _NVFP4_GROUP)
        if scale is None or whole is None or whole.numel() != 1 or t.dim() != 2 or tuple(scale.shape) != groups or \
                t.dtype != torch.uint8 or 2 * t.shape[1] % _NVFP4_GROUP:
            got = [x if x is None else f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.") for x in (t, scale, whole)]
            raise ValueError(f"{self._what}: tensor {name} in NVFP4 must be uint8 (rows, columns / 2) with a scale for "
                             f"{_NVFP4_GROUP} columns and one for all; got {', '.join(map(str, got))}")
        # A scale in uint8 is the bits of one in e4m3.
        scale = (scale.view(torch.float8_e4m3fn) if scale.dtype == torch.uint8 else scale).float()
        whole = whole.float().reshape(())
        scale = scale * whole if f"{name}_scale_2" in self._tensors else scale / whole
        numbers = torch.tensor([*_E2M1, *(-x for x in _E2M1)], device=t.device)
        pairs = torch.stack((numbers.repeat(16), numbers.repeat_interleave(16)), 1)  # of a byte, its lower half first
        wide = torch.empty(t.shape[0], 2 * t.shape[1], dtype=self._dtype, device=t.device)
        at_once = max(_NVFP4_AT_ONCE // wide.shape[1], 1)
        for rows, codes, factors in zip(wide.split(at_once), t.split(at_once), scale.split(at_once), strict=True):
            exact = pairs[codes.int()].view(len(codes), -1, _NVFP4_GROUP)
            rows.copy_((exact * factors[..., None]).view_as(rows))
        return wide

    def _factors(self, name, scale):
        """float32: a scale in uint8 is a power of two by its exponent (MX)."""
        if scale.dtype == torch.uint8:
            return torch.exp2(scale.float() - 127)
        if not scale.is_floating_point():
            raise ValueError(f"{self._what}: the scale of {name} must be of floating point, or exponents in uint8; "
                             f"got {scale.dtype}")
        return scale.float()

    def _spread(self, name, scale, shape):
        """One scale for the whole weight, for each row, or for each block of rows and columns -> one that broadcasts.
        """
        if scale.numel() == 1:
            return scale.reshape(())
        if len(shape) == 2 and scale.shape in ((shape[0],), (shape[0], 1)):
            return scale.reshape(-1, 1)
        if len(shape) == 2 and scale.dim() == 2:
            sizes = self._block or tuple(-(-n // parts) for n, parts in zip(shape, scale.shape, strict=True))
            if tuple(scale.shape) == tuple(-(-n // size) for n, size in zip(shape, sizes, strict=True)):
                rows = scale.repeat_interleave(sizes[0], 0)[:shape[0]]
                return rows.repeat_interleave(sizes[1], 1)[:, :shape[1]]
        raise ValueError(f"{self._what}: the scale of {name} must be one, one for each of {shape[0]} rows, or one for "
                         f"each block; got {tuple(scale.shape)}")
