"""One layer's paged K/V cache, which stays from call to call."""

from dataclasses import dataclass

import torch

from ._memory import huge_pages
from .limits import FP8, check_paged_dtype, check_size


@dataclass(frozen=True, eq=False)
class PagedKV:
    """One layer's paged K/V cache.

    Parameters
    ----------
    k, v : (num_pages, P, Hkv, D) float32, bfloat16, float16 or float8_e4m3fn
        Any strides with a contiguous last dimension. vLLM's NHD and HND layouts, also interleaved per layer, and
        SGLang's slot pools (P = 1) are views, not copies. Token slot s is at page s // P, row s % P.
    k_scale, v_scale : () or (1,) or (Hkv,) float32, optional
        Contiguous, on the caches' device, read by every call. A key or value is the element of a float8_e4m3fn cache
        times its scale. None: 1. Other dtypes have no scales.

    Attributes
    ----------
    is_fp8 : bool
        Whether the dtype is float8_e4m3fn.
    num_pages, page_size, num_kv_heads, head_dim : int
        The sizes num_pages, P, Hkv and D.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape, layout or device.
    NotImplementedError
        Another fp8 format.

    Notes
    -----
    A float8_e4m3fn cache is written with x / scale, a float32 division, rounded to the nearest representable value,
    ties to even. Values beyond 448, infinities too, become 448 with their sign, and NaN becomes 0x7f. vLLM's caches
    have the same bytes, and scales mean the same there and in SGLang.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import PagedKV
    >>> pool = torch.zeros(8, 2, 16, 2 * 64)  # pages, heads, rows, K and V side by side
    >>> cache = PagedKV(*pool.transpose(1, 2).split(64, -1))
    >>> cache.num_pages, cache.page_size, cache.num_kv_heads, cache.head_dim
    (8, 16, 2, 64)
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __post_init__(self):
        for name, t in (("k", self.k), ("v", self.v)):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"PagedKV: {name} must be a tensor; got {type(t).__name__}")
            check_paged_dtype(name, t.dtype)
            if t.dim() != 4:
                raise ValueError(f"PagedKV: {name} must have shape (num_pages, P, Hkv, D); got {tuple(t.shape)}")
            if t.shape[3] > 1 and t.stride(3) != 1:
                raise ValueError(f"PagedKV: {name} must be contiguous in its last dimension; got strides {t.stride()}")
        if self.k.shape != self.v.shape or self.k.dtype != self.v.dtype or self.k.device != self.v.device:
            raise ValueError(f"PagedKV: k and v must agree in shape, dtype and device; got {self.k.dtype} "
                             f"{tuple(self.k.shape)} on {self.k.device} and {self.v.dtype} {tuple(self.v.shape)} "
                             f"on {self.v.device}")
        self._check_scale("k_scale", self.k_scale)
        self._check_scale("v_scale", self.v_scale)

    def _check_scale(self, name, t):
        if t is None:
            return
        if not isinstance(t, torch.Tensor) or t.dtype != torch.float32:
            raise TypeError(f"PagedKV: {name} must be a float32 tensor; got "
                            f"{t.dtype if isinstance(t, torch.Tensor) else type(t).__name__}")
        if not self.is_fp8:
            raise ValueError(f"PagedKV: {name} must be None where the cache is not float8_e4m3fn; got one with a cache "
                             f"of {self.k.dtype}")
        if t.shape not in ((), (1,), (self.num_kv_heads,)) or not t.is_contiguous():
            raise ValueError(f"PagedKV: {name} must be contiguous, of shape (), (1,) or (Hkv,) = "
                             f"({self.num_kv_heads},); got {tuple(t.shape)} with strides {t.stride()}")
        if t.device != self.k.device:
            raise ValueError(f"PagedKV: {name} must be on {self.k.device}; got {t.device}")

    @staticmethod
    def allocate(layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> list["PagedKV"]:
        """Caches of all layers of a model, with unspecified contents, as `block_attention` reads them fastest.

        A head's rows of a page are one stretch. On a CPU they lie in huge pages where the system grants them, and all
        layers of a page side by side, so that few bytes of a huge page are never used.

        Parameters
        ----------
        layers, num_pages, page_size, num_kv_heads, head_dim : int
            At least 1; num_pages at least 0.
        dtype : torch.dtype
            float32, bfloat16, float16 or float8_e4m3fn.
        device : torch.device or str
            Where they lie.

        Returns
        -------
        caches : list of PagedKV
            One for each layer, all of one shape and stride.

        Raises
        ------
        TypeError
            A size that is no integer, or another dtype.
        ValueError
            A size below its least.
        NotImplementedError
            Another fp8 format.
        MemoryError, RuntimeError
            The device has no room for them.

        Examples
        --------
        >>> import torch
        >>> from dflash_kernels import PagedKV
        >>> caches = PagedKV.allocate(2, 8, 16, 3, 64, torch.bfloat16)
        >>> len(caches), caches[0].k.shape
        (2, torch.Size([8, 16, 3, 64]))
        """
        sizes = {"layers": layers, "num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads,
                 "head_dim": head_dim}
        for name, size in sizes.items():
            check_size("PagedKV.allocate", name, size, 0 if name == "num_pages" else 1)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"PagedKV.allocate: dtype must be a torch.dtype; got {type(dtype).__name__}")
        check_paged_dtype("dtype", dtype)
        page = num_kv_heads, page_size, head_dim
        if 2 * layers * num_pages * num_kv_heads * page_size * head_dim * dtype.itemsize >= 2**62:
            raise MemoryError("PagedKV.allocate: torch has no words for so many bytes")
        if torch.device(device).type == "cpu":
            caches = huge_pages((num_pages, layers, 2, *page), dtype).movedim(0, 2)
        else:
            caches = torch.empty((layers, 2, num_pages, *page), dtype=dtype, device=device)
        return [PagedKV(k, v) for k, v in caches.transpose(3, 4)]

    @property
    def is_fp8(self) -> bool:
        return self.k.dtype == FP8

    @property
    def num_pages(self) -> int:
        return self.k.shape[0]

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]
