"""qk_norm_rope: q and k heads are read and written once, a row of the table and a position for each token; with a cache
V is read and K and V are written to it. The floor is those bytes (ops/rope.py) over the copy bandwidth, or the launch.

A program has one token's heads of one part, q, k or v, some at a time. `load_heads`, `norm_rope` and `store_heads` are
what write_context_kv is made of too, so that a key has the same bits in the context and in a block.
Configurations are compiled without a GPU as tools/aot/launched.py launches them.
"""

import torch
import triton
import triton.language as tl

from ._fp8 import as_bytes, scale_kind, stored
from ._math import NO_SPILLS, PLAIN, inverse_rms, tree_sum

# widest head: (heads a program, warps). Estimated: 16-byte accesses of bfloat16, and sums within a warp but for the
# widest heads.
CONFIGS = {64: (16, 2), 128: (8, 2), 256: (4, 2), 1024: (1, 2)}


def tile(head_dim: int, rotary_dim: int) -> dict:
    """Constants of a head's tiles: a and b, the firsts and seconds of the pairs that rotate, c and d, the halves of the
    tail that does not. All are WIDTH wide, so that they have one layout and their squares one sum."""
    half, tail = rotary_dim // 2, (head_dim - rotary_dim + 1) // 2
    return {"ROTARY": half > 0, "TAIL": tail > 0, "WIDTH": triton.next_power_of_2(max(half, tail))}


def config(head_dim: int) -> tuple[int, int]:
    return next(found for widest, found in CONFIGS.items() if head_dim <= widest)


@triton.jit
def load_heads(at, keep, dim, rotary, INTERLEAVED: tl.constexpr, ROTARY: tl.constexpr, TAIL: tl.constexpr,
               WIDTH: tl.constexpr):
    """(HEADS, 1) pointers to heads -> a, b, c, d."""
    j = tl.arange(0, WIDTH)[None, :]
    a = tl.zeros((at.shape[0], WIDTH), at.dtype.element_ty)
    b, c, d = a, a, a
    if ROTARY:
        if INTERLEAVED:
            both = tl.arange(0, 2 * WIDTH)[None, :]
            pairs = tl.load(at + both, keep & (both < rotary), 0.0)
            a, b = tl.split(tl.reshape(pairs, (at.shape[0], WIDTH, 2)))
        else:
            half = rotary // 2
            a = tl.load(at + j, keep & (j < half), 0.0)
            b = tl.load(at + half + j, keep & (j < half), 0.0)
    if TAIL:
        c = tl.load(at + rotary + j, keep & (rotary + j < dim), 0.0)
        d = tl.load(at + rotary + WIDTH + j, keep & (rotary + WIDTH + j < dim), 0.0)
    return a, b, c, d


@triton.jit
def store_heads(at, keep, a, b, c, d, dim, rotary, INTERLEAVED: tl.constexpr, ROTARY: tl.constexpr,
                TAIL: tl.constexpr, WIDTH: tl.constexpr):
    j = tl.arange(0, WIDTH)[None, :]
    if ROTARY:
        if INTERLEAVED:
            both = tl.arange(0, 2 * WIDTH)[None, :]
            pairs = tl.reshape(tl.join(a, b), (at.shape[0], 2 * WIDTH))
            tl.store(at + both, pairs, keep & (both < rotary))
        else:
            half = rotary // 2
            tl.store(at + j, a, keep & (j < half))
            tl.store(at + half + j, b, keep & (j < half))
    if TAIL:
        tl.store(at + rotary + j, c, keep & (rotary + j < dim))
        tl.store(at + rotary + WIDTH + j, d, keep & (rotary + WIDTH + j < dim))


@triton.jit
def norm_rope(a, b, c, d, weight, table, eps, dim, rotary, count, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
              ROUND_EACH: tl.constexpr, ROTARY: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr):
    """Heads normed with `weight` and rotated with the row `table` of the table, in their own dtype."""
    kind = a.dtype
    # Loaded for every head, from the nearest cache: a (1, WIDTH) tile would get a layout of its own, and be exchanged
    # through shared memory.
    each_head = tl.zeros((a.shape[0], 1), tl.int32)
    a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    # The norm, over all four tiles.
    if NORM:
        scale = inverse_rms(tree_sum((a * a + b * b) + (c * c + d * d)), count, eps)
        wa, wb, wc, wd = load_heads(weight + each_head, each_head == 0, dim, rotary, INTERLEAVED, ROTARY, TAIL, WIDTH)
        a, b = a * scale * wa.to(tl.float32), b * scale * wb.to(tl.float32)
        c, d = c * scale * wc.to(tl.float32), d * scale * wd.to(tl.float32)
        if ROUND_EACH:
            a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
    # The rotation of the pairs (a, b).
    if ROTARY:
        j = each_head + tl.arange(0, WIDTH)[None, :]
        half = rotary // 2
        cos = tl.load(table + j, j < half, 0.0).to(tl.float32)
        sin = tl.load(table + half + j, j < half, 0.0).to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    return a.to(kind), b.to(kind), c.to(kind), d.to(kind)


@triton.jit
def place(slot_at, num_pages, page_size):
    """Page and row of the slot at this address, and whether they exist."""
    slot = tl.load(slot_at)
    exists = (slot >= 0) & (slot // page_size < num_pages)
    slot = tl.where(exists, slot, 0)
    return slot // page_size, slot % page_size, exists


@triton.jit
def nan_unless(known, x):
    return tl.where(known, x, float("nan")).to(x.dtype)


@triton.jit
def turn_in_place(at, keep, known, weight, table, eps, dim, rotary, count, NORM: tl.constexpr,
                  INTERLEAVED: tl.constexpr, ROUND_EACH: tl.constexpr, ROTARY: tl.constexpr, TAIL: tl.constexpr,
                  WIDTH: tl.constexpr):
    a, b, c, d = load_heads(at, keep, dim, rotary, INTERLEAVED, ROTARY, TAIL, WIDTH)
    a, b, c, d = norm_rope(a, b, c, d, weight, table, eps, dim, rotary, count, NORM, INTERLEAVED, ROUND_EACH,
                           ROTARY, TAIL, WIDTH)
    a, b = nan_unless(known, a), nan_unless(known, b)
    c, d = nan_unless(known, c), nan_unless(known, d)
    store_heads(at, keep, a, b, c, d, dim, rotary, INTERLEAVED, ROTARY, TAIL, WIDTH)
    return a, b, c, d


@triton.jit
def qk_norm_rope_kernel(qkv, positions, cos_sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots,
                        row_stride, k_page, k_row, k_head, v_page, v_row, v_head,
                        num_pages, page_size, max_pos, heads, kv_heads, dim, rotary, count, eps,
                        NORM_Q: tl.constexpr, NORM_K: tl.constexpr, CACHED: tl.constexpr,
                        FP8: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
                        INTERLEAVED: tl.constexpr, ROUND_EACH: tl.constexpr,
                        ROTARY: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    # The table's row of the token's position; a position outside the table makes NaN.
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    known = position == position
    table = cos_sin
    if ROTARY:
        known = (position >= 0) & (position < max_pos)
        table = cos_sin + tl.where(known, position, 0) * rotary
    # Groups of heads: those of q, then of k, then of v.
    row = qkv + token * row_stride
    group = tl.program_id(1)
    k_group = group - tl.cdiv(heads, HEADS)
    v_group = k_group - tl.cdiv(kv_heads, HEADS)
    lanes = tl.arange(0, HEADS)[:, None]
    if k_group < 0:
        q = group * HEADS + lanes
        turn_in_place(row + q * dim, q < heads, known, q_weight, table, eps, dim, rotary, count, NORM_Q, INTERLEAVED,
                      ROUND_EACH, ROTARY, TAIL, WIDTH)
    elif v_group < 0:
        k = k_group * HEADS + lanes
        ka, kb, kc, kd = turn_in_place(row + (heads + k) * dim, k < kv_heads, known, k_weight, table, eps, dim, rotary,
                                       count, NORM_K, INTERLEAVED, ROUND_EACH, ROTARY, TAIL, WIDTH)
        # A key goes to its page too; with an fp8 cache, rounded there alone.
        if CACHED:
            k_page_id, k_row_id, k_exists = place(slots + token, num_pages, page_size)
            if FP8:
                ka, kb = stored(ka, k_scale, k, k < kv_heads, K_SCALE), stored(kb, k_scale, k, k < kv_heads, K_SCALE)
                kc, kd = stored(kc, k_scale, k, k < kv_heads, K_SCALE), stored(kd, k_scale, k, k < kv_heads, K_SCALE)
            store_heads(k_cache + k_page_id * k_page + k_row_id * k_row + k.to(tl.int64) * k_head,
                        tl.where(k_exists & known, k < kv_heads, False), ka, kb, kc, kd, dim, rotary, INTERLEAVED,
                        ROTARY, TAIL, WIDTH)
    elif CACHED:
        v = v_group * HEADS + lanes
        va, vb, vc, vd = load_heads(row + (heads + kv_heads + v) * dim, v < kv_heads, dim, rotary, False, ROTARY, TAIL,
                                    WIDTH)
        v_page_id, v_row_id, v_exists = place(slots + token, num_pages, page_size)
        if FP8:
            va, vb = stored(va, v_scale, v, v < kv_heads, V_SCALE), stored(vb, v_scale, v, v < kv_heads, V_SCALE)
            vc, vd = stored(vc, v_scale, v, v < kv_heads, V_SCALE), stored(vd, v_scale, v, v < kv_heads, V_SCALE)
        store_heads(v_cache + v_page_id * v_page + v_row_id * v_row + v.to(tl.int64) * v_head,
                    tl.where(v_exists & known, v < kv_heads, False), va, vb, vc, vd, dim, rotary, False, ROTARY, TAIL,
                    WIDTH)


def qk_norm_rope(qkv, positions, cos_sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots, num_heads,
                 num_kv_heads, head_dim, eps, interleaved, round_each):
    cached = k_cache is not None
    heads, warps = config(head_dim)
    groups = triton.cdiv(num_heads, heads) + (2 if cached else 1) * triton.cdiv(num_kv_heads, heads)
    tokens, rotary, max_pos = qkv.shape[0], 0, 0
    if not tokens or not groups:
        return
    if cos_sin is not None:
        max_pos, rotary = cos_sin.shape
    k_strides = k_cache.stride()[:3] if cached else (0, 0, 0)
    v_strides = v_cache.stride()[:3] if cached else (0, 0, 0)
    num_pages, page_size = k_cache.shape[:2] if cached else (0, 1)
    fp8 = cached and k_cache.dtype == torch.float8_e4m3fn
    if fp8:
        k_cache, v_cache = as_bytes(k_cache), as_bytes(v_cache)
    qk_norm_rope_kernel[tokens, groups](
        qkv, positions, cos_sin, q_weight, k_weight, k_cache, v_cache, k_scale, v_scale, slots, qkv.stride(0),
        *k_strides, *v_strides, num_pages, page_size, max_pos, num_heads, num_kv_heads, head_dim, rotary,
        float(head_dim), eps, NORM_Q=q_weight is not None, NORM_K=k_weight is not None, CACHED=cached, FP8=fp8,
        K_SCALE=scale_kind(k_scale), V_SCALE=scale_kind(v_scale), INTERLEAVED=interleaved, ROUND_EACH=round_each,
        **tile(head_dim, rotary), HEADS=heads, num_warps=warps, **(PLAIN if rotary else NO_SPILLS))
