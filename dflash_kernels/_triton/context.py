"""write_context_kv: each written row's K and V are read once and written once, for all layers in one launch; with a row
of the table and two indices a token that is the floor (ops/context.py) over the copy bandwidth, or the launch.

A program has some heads of one token and layer, K and V together, so that their loads are in flight at the same time.
Layers' caches are separate tensors, and so are an fp8 cache's scales: the kernel finds them in a table of addresses
that is made once for each set of caches. The table of configurations is rope's, as a key's bits must be.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import torch
import triton
import triton.language as tl

from ._fp8 import scale_kind, stored
from ._math import PLAIN
from .rope import config, load_heads, norm_rope, place, store_heads, tile

_bases: dict[tuple, tuple[torch.Tensor, bool]] = {}


def base_addresses(k_caches, v_caches, k_scales=(), v_scales=()) -> tuple[torch.Tensor, bool]:
    """int64 addresses on the caches' device, in the arguments' order, and whether those of the caches divide by 16.

    Never dropped: a captured graph holds on to the table's address, and a table is at most 32 bytes a layer.
    """
    pointers = tuple(t.data_ptr() for t in (*k_caches, *v_caches, *k_scales, *v_scales))
    device = k_caches[0].device
    found = _bases.get((device, pointers))
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("write_context_kv: the addresses of these caches are not on the device yet; call it "
                               "once with them before capturing a graph")
        table = torch.tensor(pointers, dtype=torch.int64, device=device)
        found = _bases[device, pointers] = table, not any(p % 16 for p in pointers[:len(k_caches) + len(v_caches)])
    return found


@triton.jit
def base_of(bases, index, like, FP8: tl.constexpr, ALIGNED: tl.constexpr):
    base = tl.load(bases + index)
    base = base.to(tl.pointer_type(tl.uint8)) if FP8 else base.to(like.dtype)
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit
def scale_of(bases, index, SCALE: tl.constexpr):
    """Where a layer's scales are, if it has any."""
    if SCALE > 0:
        return tl.load(bases + index).to(tl.pointer_type(tl.float32))
    else:
        return bases


@triton.jit(do_not_specialize=["slots_layer_stride", "block"])
def write_context_kv_kernel(kv, positions, slots, bases, k_weights, cos_sin, commit_lens,
                            row_stride, slots_layer_stride, block, k_page, k_row, k_head, v_page, v_row, v_head,
                            num_pages, page_size, max_pos, layers, kv_heads, dim, rotary, count, eps, v_scale,
                            NORM: tl.constexpr, COMMITTED: tl.constexpr, SCALE_V: tl.constexpr,
                            FP8: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, ALIGNED: tl.constexpr,
                            INTERLEAVED: tl.constexpr, ROUND_EACH: tl.constexpr,
                            ROTARY: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    # Whether the token is written: it has a slot, was committed, and its position is in the table.
    token = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    page, page_row, written = place(slots + layer.to(tl.int64) * slots_layer_stride + token, num_pages, page_size)
    if COMMITTED:
        written = written & (token % block < tl.load(commit_lens + token // block))
    position = tl.load(positions + token)
    table = cos_sin
    weight = k_weights
    if ROTARY:
        written = written & (position >= 0) & (position < max_pos)
        table = cos_sin + tl.where(written, position, 0) * rotary
    if NORM:
        weight = k_weights + layer * dim
    if written:
        # K and V of HEADS heads, both in flight before either is computed with.
        head = (tl.program_id(2) * HEADS + tl.arange(0, HEADS))[:, None]
        keep, far = head < kv_heads, head.to(tl.int64)  # a cache may have its heads outermost
        at = kv + token * row_stride + (layer * 2 * kv_heads + head) * dim
        a, b, c, d = load_heads(at, keep, dim, rotary, INTERLEAVED, ROTARY, TAIL, WIDTH)
        va, vb, vc, vd = load_heads(at + kv_heads * dim, keep, dim, rotary, False, ROTARY, TAIL, WIDTH)
        # Keys: normed, rotated, rounded to the cache's type.
        a, b, c, d = norm_rope(a, b, c, d, weight, table, eps, dim, rotary, count, NORM, INTERLEAVED, ROUND_EACH,
                               ROTARY, TAIL, WIDTH)
        if FP8:
            k_scale = scale_of(bases, 2 * layers + layer, K_SCALE)
            a, b = stored(a, k_scale, head, keep, K_SCALE), stored(b, k_scale, head, keep, K_SCALE)
            c, d = stored(c, k_scale, head, keep, K_SCALE), stored(d, k_scale, head, keep, K_SCALE)
        k_out = base_of(bases, layer, kv, FP8, ALIGNED) + page * k_page + page_row * k_row + far * k_head
        store_heads(k_out, keep, a, b, c, d, dim, rotary, INTERLEAVED, ROTARY, TAIL, WIDTH)
        # Values: scaled, rounded.
        if SCALE_V:
            va, vb = scaled(va, v_scale), scaled(vb, v_scale)
            vc, vd = scaled(vc, v_scale), scaled(vd, v_scale)
        if FP8:
            divisor = scale_of(bases, layers * (3 if K_SCALE > 0 else 2) + layer, V_SCALE)
            va, vb = stored(va, divisor, head, keep, V_SCALE), stored(vb, divisor, head, keep, V_SCALE)
            vc, vd = stored(vc, divisor, head, keep, V_SCALE), stored(vd, divisor, head, keep, V_SCALE)
        v_out = base_of(bases, layers + layer, kv, FP8, ALIGNED) + page * v_page + page_row * v_row + far * v_head
        store_heads(v_out, keep, va, vb, vc, vd, dim, rotary, False, ROTARY, TAIL, WIDTH)


@triton.jit
def scaled(x, factor):
    return (x.to(tl.float32) * factor).to(x.dtype)


def write_context_kv(kv, positions, slots, k_caches, v_caches, k_scales, v_scales, k_weights, cos_sin, commit_lens, eps,
                     v_scale, interleaved, round_each):
    tokens, layers, k, v = kv.shape[0], len(k_caches), k_caches[0], v_caches[0]
    num_pages, page_size, kv_heads, dim = k.shape
    if not tokens or not k.numel():
        return
    bases, aligned = base_addresses(k_caches, v_caches, k_scales, v_scales)
    heads, warps = config(dim)
    max_pos, rotary = (0, 0) if cos_sin is None else cos_sin.shape
    write_context_kv_kernel[tokens, layers, triton.cdiv(kv_heads, heads)](
        kv, positions, slots, bases, k_weights, cos_sin, commit_lens, kv.stride(0),
        slots.stride(0) if slots.dim() == 2 else 0, 1 if commit_lens is None else tokens // commit_lens.shape[0],
        *k.stride()[:3], *v.stride()[:3], num_pages, page_size, max_pos, layers, kv_heads, dim, rotary, float(dim), eps,
        v_scale, NORM=k_weights is not None, COMMITTED=commit_lens is not None, SCALE_V=v_scale != 1.0,
        FP8=k.dtype == torch.float8_e4m3fn, K_SCALE=scale_kind(k_scales[0] if k_scales else None),
        V_SCALE=scale_kind(v_scales[0] if v_scales else None), ALIGNED=aligned, INTERLEAVED=interleaved,
        ROUND_EACH=round_each, **tile(dim, rotary), HEADS=heads, num_warps=warps, **PLAIN)
