"""Packed weights, which stay from call to call."""

from dataclasses import dataclass

import torch

from ._namespace import OPS
from .formats import EVERY, EXACT, gpu_shape, packed_bytes
from .limits import FLOATS, check_format, listed


def _packed_shape(n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[int, ...]:
    """Of a weight (n, k) of elements, as pack_weight lays it out."""
    blocks = (n + 15) // 16
    if device.type == "cuda":
        return n, k
    if dtype == torch.bfloat16:
        return blocks, (k + 31) // 32 * 16, 16, 2
    if dtype == torch.int8:
        return blocks, (k + 31) // 32 * 32, 16
    return blocks, k, 16


def _own(data: torch.Tensor | None) -> torch.Tensor | None:
    """On a CPU weights share memory (_memory.py): a copy or a pickle takes one weight's bytes, not all of them."""
    return data if data is None or data.untyped_storage().nbytes() == data.nbytes else data.clone()


def _check_sizes(what: str, n: int, k: int) -> None:
    for name, size in (("out_features", n), ("in_features", k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{what}: {name} must be a positive int; got {size!r}")


def _check_elements(what: str, data: torch.Tensor, scales: torch.Tensor | None) -> None:
    dtypes = FLOATS if scales is None else (torch.int8,)
    if not isinstance(data, torch.Tensor) or data.dtype not in dtypes:
        want = listed(FLOATS) if scales is None else "int8, as there are scales"
        got = data.dtype if isinstance(data, torch.Tensor) else repr(data)
        raise TypeError(f"{what}: data must be a tensor of {want}; got {got}")


def _check_scales(what: str, scales: torch.Tensor | None, shape: tuple[int, ...], data: torch.Tensor) -> None:
    if scales is None:
        return
    if not isinstance(scales, torch.Tensor) or scales.dtype != torch.float32:
        got = scales.dtype if isinstance(scales, torch.Tensor) else repr(scales)
        raise TypeError(f"{what}: scales must be a tensor of float32; got {got}")
    if scales.shape != shape or not scales.is_contiguous() or scales.device != data.device:
        raise ValueError(f"{what}: scales must be contiguous {shape} on {data.device}; got {tuple(scales.shape)} with "
                         f"strides {scales.stride()} on {scales.device}")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A linear layer's (N, K) weight in the layout that `linear` and the LM heads stream. `pack_weight` makes it.

    Parameters
    ----------
    data : float32, bfloat16 or float16, or int8 with scales, or uint8 with a format
        On CUDA (N, K), row-major, or with a format the records of _triton/_quant.py. Elsewhere blocks of 16 outputs, in
        the order of csrc/cpu/gemm.h, or with a format of csrc/cpu/quant.h.
    out_features, in_features : int
        N and K.
    scales : (N,) float32, optional
        The weight is scales[:, None] * data. None: it is data.
    format : str, optional
        Name of the format of blocks. None: elements.
    exact : bool
        Whether blocks become elements of x's dtype before they are multiplied, as always on CUDA. False: rows of x
        become int8.

    Attributes
    ----------
    dtype : torch.dtype
        The dtype of data.
    shape : tuple of int
        N and K.
    format_number : int
        The format, with exact, as the ops' schemas take it. 0: elements.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import pack_weight
    >>> packed = pack_weight(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> packed.out_features, packed.rows(torch.tensor([1])).tolist()
    (2, [[3.0, 4.0]])
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    scales: torch.Tensor | None = None
    format: str | None = None
    exact: bool = False

    def __post_init__(self):
        n, k = self.out_features, self.in_features
        _check_sizes("PackedWeight", n, k)
        if not isinstance(self.exact, bool) or self.exact and self.format is None:
            raise ValueError(f"PackedWeight: exact must be False, or True where there is a format; got {self.exact!r}")
        if self.format is not None:
            return self._check_blocks()
        _check_elements("PackedWeight", self.data, self.scales)
        _check_scales("PackedWeight", self.scales, (n,), self.data)
        shape = _packed_shape(n, k, self.data.dtype, self.data.device)
        if self.data.shape != shape or not self.data.is_contiguous():
            raise ValueError(f"PackedWeight: data must be contiguous {shape}, as pack_weight lays it out; "
                             f"got {tuple(self.data.shape)} with strides {self.data.stride()}")

    def _check_blocks(self):
        device = self.data.device.type if isinstance(self.data, torch.Tensor) else None
        check_format("PackedWeight", self.format, device)
        f, n, k = EVERY[str(self.format)], self.out_features, self.in_features
        if k % f.block:
            raise ValueError(f"PackedWeight: in_features must be a multiple of {f.block}, the block of {self.format}; "
                             f"got {k}")
        if self.scales is not None:
            raise ValueError("PackedWeight: scales must be None where there is a format; got a tensor")
        if not isinstance(self.data, torch.Tensor) or self.data.dtype != torch.uint8:
            got = self.data.dtype if isinstance(self.data, torch.Tensor) else repr(self.data)
            raise TypeError(f"PackedWeight: data must be a tensor of uint8, as there is a format; got {got}")
        if device == "cuda" and not self.exact:
            raise ValueError("PackedWeight: exact must be True where there is a format on CUDA; got False")
        if device == "cuda" and self.data.data_ptr() % 16:
            raise ValueError("PackedWeight: data must begin at a multiple of 16 bytes on CUDA, as a tensor of its own "
                             "does; got a part of another")
        shape: tuple[int, ...]
        shape = gpu_shape(f, n, k) if device == "cuda" else ((n + 15) // 16, packed_bytes(f, k))
        if self.data.shape != shape or not self.data.is_contiguous():
            raise ValueError(f"PackedWeight: data must be contiguous {shape}, as pack_weight lays it out; "
                             f"got {tuple(self.data.shape)} with strides {self.data.stride()}")

    def __reduce__(self):
        return PackedWeight, (_own(self.data), self.out_features, self.in_features, _own(self.scales), self.format,
                              self.exact)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def format_number(self) -> int:
        return 0 if self.format is None else EVERY[self.format].number + (EXACT if self.exact else 0)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Unpacks single rows. Not graph-safe.

        Parameters
        ----------
        index : (n,) int64
            Rows of the weight.

        Returns
        -------
        rows : (n, K) dtype of data
            float32 if the weight has 8 bits or blocks.

        Raises
        ------
        TypeError
            Another dtype of index.
        ValueError
            Another shape.
        IndexError
            A row that the weight has not.

        Examples
        --------
        >>> import torch
        >>> from dflash_kernels import pack_weight
        >>> packed = pack_weight(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), torch.tensor([1.0, 0.5]))
        >>> packed.rows(torch.tensor([1, 0])).tolist()
        [[1.5, 2.0], [1.0, 2.0]]
        """
        if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
            got = getattr(index, "dtype", type(index).__name__)
            raise TypeError(f"PackedWeight.rows: index must be int64 (n,); got {got}")
        if index.dim() != 1:
            raise ValueError(f"PackedWeight.rows: index must have shape (n,); got {tuple(index.shape)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.out_features:
            raise IndexError(f"PackedWeight.rows: index must be rows in [0, {self.out_features}); "
                             f"got {int(index.min())} to {int(index.max())}")
        if self.format is not None:
            out = torch.empty(len(index), self.in_features, dtype=torch.float32, device=self.data.device)
            number = EVERY[self.format].number
            getattr(torch.ops, OPS).embed_tokens(index.contiguous()[None], self.data, number, out[None])
            return out
        if self.data.dim() == 2:
            found = self.data[index]
        else:
            found = self.data[index // 16, :, index % 16].flatten(1)[:, :self.in_features]
        return found if self.scales is None else found * self.scales[index, None]


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The (N, K) weights of a layer's E experts in the layout that `expert_mlp` streams. `pack_experts` makes them.

    Parameters
    ----------
    data : float32, bfloat16 or float16, or int8 with scales
        Of E weights one after another, each as in a PackedWeight.
    out_features, in_features : int
        N and K.
    scales : (E, N) float32, optional
        The weights are scales[:, :, None] * data. None: they are data.

    Attributes
    ----------
    dtype : torch.dtype
        The dtype of data.
    num_experts : int
        E.
    shape : tuple of int
        E, N and K.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import linear, pack_experts
    >>> experts = pack_experts(torch.arange(12.0).view(2, 3, 2))
    >>> experts.shape, linear(torch.tensor([[1.0, 0.0]]), experts.expert(1)).tolist()
    ((2, 3, 2), [[6.0, 8.0, 10.0]])
    """

    data: torch.Tensor
    out_features: int
    in_features: int
    scales: torch.Tensor | None = None

    def __post_init__(self):
        n, k = self.out_features, self.in_features
        _check_sizes("PackedExperts", n, k)
        _check_elements("PackedExperts", self.data, self.scales)
        shape = _packed_shape(n, k, self.data.dtype, self.data.device)
        if self.data.shape[1:] != shape or not self.data.is_contiguous() or not len(self.data):
            raise ValueError(f"PackedExperts: data must be contiguous (E, {', '.join(map(str, shape))}), as "
                             f"pack_experts lays it out; got {tuple(self.data.shape)} with strides "
                             f"{self.data.stride()}")
        _check_scales("PackedExperts", self.scales, (len(self.data), n), self.data)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def __reduce__(self):
        return PackedExperts, (_own(self.data), self.out_features, self.in_features, _own(self.scales))

    @property
    def num_experts(self) -> int:
        return self.data.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_experts, self.out_features, self.in_features

    def expert(self, index: int) -> PackedWeight:
        """One expert's weight, in the same memory.

        Parameters
        ----------
        index : int
            0 to E - 1.

        Returns
        -------
        weight : PackedWeight

        Raises
        ------
        ValueError
            No such expert.

        Examples
        --------
        >>> import torch
        >>> from dflash_kernels import pack_experts
        >>> pack_experts(torch.arange(12.0).view(2, 3, 2)).expert(0).rows(torch.tensor([2])).tolist()
        [[4.0, 5.0]]
        """
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.num_experts:
            raise ValueError(f"PackedExperts.expert: index must be an int below {self.num_experts}; got {index!r}")
        scales = None if self.scales is None else self.scales[index]
        return PackedWeight(self.data[index], self.out_features, self.in_features, scales)
