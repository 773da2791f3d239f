"""Limits of the ops. The ops raise them, and `supports` answers them without a call.

Each limit is one function here, which raises with the text that a user reads. An op or a launcher calls it with its
arguments, `supports` with the facts in question.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .formats import EVERY, GROUPED

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
FLOAT32_MAX = torch.finfo(torch.float32).max
MAX_HEAD_DIM = 1024  # kMaxHeadDim in csrc/cpu/rope_head.h
MAX_LAYERS = 64  # kMaxLayers in csrc/params/context.h
MAX_K = 64
MAX_EXPERTS = 1024  # of a router, which keeps a row's scores in registers
# The widest heads that block_attention has a configuration for on a GPU. With float32 queries over an fp8 cache the
# sums of wider heads, beside the cache's conversion, spill on sm_100 and sm_120.
GPU_HEAD_DIM, GPU_HEAD_DIM_FLOAT32_FP8 = 256, 64


@dataclass(frozen=True)
class Support:
    """The answer of `supports`. It is true where the op accepts the facts.

    Parameters
    ----------
    ok : bool
        Whether the op accepts the facts.
    reason : str
        Text of the exception that a call would raise. "" where ok.

    Examples
    --------
    >>> from dflash_kernels import supports
    >>> support = supports("combine_topk", k=65)
    >>> support.ok, support.reason
    (False, 'combine_topk: k must be between 1 and 64; got 65')
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class _Main(NamedTuple):
    """The argument whose dtype `supports` calls the op's, as messages name it, and the other facts of the op."""

    name: str
    shape: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    facts: tuple[str, ...] = ()


_X = _Main("x", "(..., H)")
_BLOCKS = _Main("x", "(B, Q, H)")
_ROWS = _Main("x", "(..., K)", facts=("weight_dtype", "weight_format"))
_LOGITS = _Main("logits", "(B, Q, V)")
_F32 = (torch.float32,)
_OPS = {
    "rms_norm": _X,
    "add_rms_norm": _X,
    "grouped_conv": _BLOCKS,
    "grouped_conv_add_rms_norm": _BLOCKS,
    "silu_and_mul": _Main("x", "(..., 2I)"),
    "qk_norm_rope": _Main("qkv", "(T, (Hq + 2 Hkv) * D)", facts=("cache_dtype", "head_dim")),
    "write_context_kv": _Main("kv", "(T, L * 2 * Hkv * D)", facts=("cache_dtype", "head_dim", "layers")),
    "block_attention": _Main("q", "(B, Q, Hq, D)", facts=("cache_dtype", "head_dim")),
    "route_experts": _Main("logits", "(T, E)", facts=("experts", "k")),
    "expert_mlp": _Main("x", "(T, H)", facts=("weight_dtype",)),
    "linear": _ROWS,
    "lm_head_argmax": _ROWS,
    "lm_head_topk": _ROWS._replace(facts=("weight_dtype", "weight_format", "k")),
    "combine_argmax": _Main("values", "(S, R)", _F32),
    "combine_topk": _Main("values", "(S, R, k)", _F32, ("k",)),
    "prepare_block": _Main("embedding", "(V, H)", facts=("weight_format",)),
    "embed_tokens": _Main("table", "(V, H)", (*FLOATS, torch.int64), ("weight_format",)),
    "verify_greedy": _LOGITS,
    "verify_sample": _LOGITS,
    "sample_draft": _Main("values", "(B, Q - 1, K)", _F32),
    "select_candidates": _Main("values", "(B, Q - 1, K)", _F32, ("k",)),
}


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def listed(dtypes: Iterable[torch.dtype]) -> str:
    """As in "float32, bfloat16 or float16"."""
    *most, last = map(named, dtypes)
    return f"{', '.join(most)} or {last}" if most else last


# ---- the limits ----------------------------------------------------------------------------------------------------


def check_size(op: str, name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}; got {value}")
    return value


def check_head_dim(op: str, head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"{op}: head_dim must be <= {MAX_HEAD_DIM}; got {head_dim}")


def check_layers(op: str, layers: int) -> None:
    if layers > MAX_LAYERS:
        raise NotImplementedError(f"{op}: caches must be at most {MAX_LAYERS} layers; got {layers}")


def check_k(op: str, k: int, most: int = MAX_K) -> None:
    """most: fewer, where the vocabulary has fewer."""
    if not 1 <= k <= most:
        raise ValueError(f"{op}: k must be between 1 and {most}; got {k}")


def check_experts(op: str, experts: int) -> None:
    if not 1 <= experts <= MAX_EXPERTS:
        raise NotImplementedError(f"{op}: logits must have 1 to {MAX_EXPERTS} experts; got {experts}")


def check_gpu_attention(dtype: torch.dtype | None, cache_dtype: torch.dtype | None, head_dim: int) -> None:
    """dtype: of the queries. None: not known, which only `supports` may say."""
    if head_dim > GPU_HEAD_DIM:
        raise NotImplementedError(f"block_attention: heads of more than {GPU_HEAD_DIM} have no CUDA kernel; "
                                  f"got {head_dim}")
    if dtype == torch.float32 and cache_dtype == FP8 and head_dim > GPU_HEAD_DIM_FLOAT32_FP8:
        raise NotImplementedError("block_attention: float32 queries over an fp8 cache have a CUDA kernel only up to "
                                  f"heads of {GPU_HEAD_DIM_FLOAT32_FP8}; got {head_dim}: use bfloat16 or float16 "
                                  "queries")


def check_paged_dtype(name: str, dtype: torch.dtype) -> None:
    """Of a PagedKV's k or v."""
    if dtype not in (*FLOATS, FP8):
        error = NotImplementedError if "float8" in str(dtype) else TypeError
        raise error(f"PagedKV: {name} must be {listed((*FLOATS, FP8))}; got {dtype}")


def check_packed_dtype(op: str, dtype: torch.dtype, packed: torch.dtype, name: str = "weight") -> None:
    """Of a PackedWeight or PackedExperts without scales, beside rows of dtype."""
    if packed != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, as x is; got packed {packed}")


def check_format(op: str, format: object, device: str | None) -> None:
    """Of a weight in blocks. device: its type; None: not known, which only `supports` may say."""
    if not isinstance(format, str) or format not in EVERY:
        raise ValueError(f"{op}: format must be one of {', '.join(EVERY)}; got {format!r}")
    if format in GROUPED and device not in (None, "cuda"):
        raise NotImplementedError(f"{op}: weights in {format} have kernels on CUDA alone; got {device}")


def check_group_order(op: str, k: int, group: int) -> None:
    """Of a GPTQ checkpoint's g_idx."""
    if group != k // 128:
        raise NotImplementedError(f"{op}: g_idx must be k // 128, as it is without desc_act; got {group} for k = {k}")


def _check_dtype(op: str, dtype: torch.dtype) -> None:
    name, shape, dtypes, _ = _OPS[op]
    if dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {listed(dtypes)} {shape}; got {named(dtype)}")


def _check_weight_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"pack_weight: weight must be {listed(FLOATS)} (N, K); got {named(dtype)}")


def _check_cache_dtype(op: str, dtype: torch.dtype | None, cache_dtype: torch.dtype) -> None:
    check_paged_dtype("k", cache_dtype)
    if dtype is not None and cache_dtype not in (dtype, FP8):
        name = "caches[0].k" if op == "write_context_kv" else "cache.k"
        raise TypeError(f"{op}: {name} must be {listed((dtype, FP8))} (num_pages, P, Hkv, D); got {named(cache_dtype)}")


# ---- the question --------------------------------------------------------------------------------------------------


def supports(op: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
             cache_dtype: torch.dtype | None = None, weight_dtype: torch.dtype | None = None,
             weight_format: str | None = None, head_dim: int | None = None, layers: int | None = None,
             k: int | None = None, experts: int | None = None) -> Support:
    """Whether an op takes tensors of this kind, and why not. Nothing is launched, and no GPU is touched.

    Facts that are left out refuse nothing. An op is asked about its own facts alone: `layers` is a fact of
    write_context_kv, for instance, and of no other op.

    Parameters
    ----------
    op : str
        Name of an op, as in build_info()["ops"].
    device : str or torch.device, optional
        Where the tensors are, such as "cuda". On a GPU these are the limits of the GPU kernels; an installation without
        Triton answers there with the reference, which has fewer.
    dtype : torch.dtype, optional
        Of the op's first float argument: x, q, qkv, kv, values, logits, embedding or table.
    cache_dtype : torch.dtype, optional
        Of the PagedKV of qk_norm_rope, write_context_kv and block_attention.
    weight_dtype : torch.dtype, optional
        Of the PackedWeight of linear, lm_head_argmax and lm_head_topk, or the PackedExperts of expert_mlp; int8 with
        scales.
    weight_format : str, optional
        Of such a PackedWeight in blocks, or of the table of embed_tokens and prepare_block.
    head_dim : int, optional
        D of qk_norm_rope, write_context_kv and block_attention.
    layers : int, optional
        L, the number of caches of write_context_kv.
    k : int, optional
        Candidates of a row, in lm_head_topk, combine_topk and select_candidates, or its experts in route_experts.
    experts : int, optional
        E, which route_experts chooses from.

    Returns
    -------
    Support
        True, or false with the reason. The reason is the text of the exception that the call would raise; where a
        tensor has the wrong dtype, the call adds its shape.

    Raises
    ------
    TypeError
        A fact that the op does not have, or a value of the wrong type.
    ValueError
        An unknown op or device, or a size below 1.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import supports
    >>> bool(supports("block_attention", device="cuda", dtype=torch.bfloat16, head_dim=128))
    True
    >>> supports("block_attention", device="cuda", dtype=torch.bfloat16, head_dim=320).reason
    'block_attention: heads of more than 256 have no CUDA kernel; got 320'
    """
    if op not in _OPS:
        raise ValueError(f"supports: op must be one of {', '.join(sorted(_OPS))}; got {op!r}")
    _check_facts(op, {"dtype": dtype, "cache_dtype": cache_dtype, "weight_dtype": weight_dtype},
                 {"head_dim": head_dim, "layers": layers, "k": k, "experts": experts}, weight_format)
    kind = _device_type(device)
    try:
        if dtype is not None:
            _check_dtype(op, dtype)
        if cache_dtype is not None:
            _check_cache_dtype(op, dtype, cache_dtype)
        if weight_dtype not in (None, torch.int8):
            _check_weight_dtype(weight_dtype)
            if dtype is not None:
                check_packed_dtype(op, dtype, weight_dtype, "gate_up" if op == "expert_mlp" else "weight")
        if weight_format is not None:
            check_format("pack_weight", weight_format, kind)
        if head_dim is not None and op != "block_attention":
            check_head_dim(op, head_dim)
        elif head_dim is not None and kind == "cuda":
            check_gpu_attention(dtype, cache_dtype, head_dim)
        if layers is not None:
            check_layers(op, layers)
        if experts is not None:
            check_experts(op, experts)
        if k is not None:
            check_k(op, k, MAX_K if experts is None else min(MAX_K, experts))
    except (TypeError, ValueError, NotImplementedError) as refused:
        return Support(False, str(refused))
    return Support(True)


def _check_facts(op: str, dtypes: dict[str, torch.dtype | None], sizes: dict[str, int | None],
                 weight_format: str | None) -> None:
    facts = ("device", "dtype", *_OPS[op].facts)
    if weight_format is not None and not isinstance(weight_format, str):
        raise TypeError(f"supports: weight_format must be a str; got {weight_format!r}")
    for name, value in (dtypes | sizes | {"weight_format": weight_format}).items():
        if value is not None and name not in facts:
            raise TypeError(f"supports: facts of {op} must be among {', '.join(facts)}; got {name}")
    for name, dtype in dtypes.items():
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"supports: {name} must be a torch.dtype; got {dtype!r}")
    for name, size in sizes.items():
        if size is not None:
            check_size("supports", name, size, 1)


def _device_type(device: str | torch.device | None) -> str | None:
    if device is None:
        return None
    if isinstance(device, torch.device):
        return device.type
    if not isinstance(device, str):
        raise TypeError(f"supports: device must be a str or torch.device; got {device!r}")
    try:
        return torch.device(device).type
    except RuntimeError:
        raise ValueError(f"supports: device must be one that torch knows; got {device!r}") from None
