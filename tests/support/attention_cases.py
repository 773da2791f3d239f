"""Inputs of block_attention and what it must answer, for its tests on every backend."""

import torch

from dflash_kernels import block_attention, reference
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

NAN = float("nan")


class Case:
    """Requests with `contexts` committed tokens and a block of `width`; every slot that no request owns is NaN, every
    page-table entry past a context is absurd."""

    def __init__(self, contexts, width=4, heads=6, kv_heads=2, dim=64, page=16, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(len(contexts), width, heads, dim, generator=g).to(dtype)
        # k and v of every position of each request, block included: the truth that pages are filled from.
        self.k, self.v = ([torch.randn(c + width, kv_heads, dim, generator=g).to(dtype) for c in contexts]
                          for _ in range(2))
        self.contexts, self.width, self.page = list(contexts), width, page
        self.lens = torch.tensor(contexts, dtype=torch.int32)
        needed = [-(-c // page) for c in contexts]
        num_pages = sum(needed) + 2
        self.cache = PagedKV(*(torch.full((num_pages, page, kv_heads, dim), NAN, dtype=dtype) for _ in range(2)))
        ids = (torch.randperm(num_pages - 1, generator=g) + 1).tolist()
        self.table = torch.full((len(contexts), max(needed, default=0) + 2), 2**30, dtype=torch.int32)
        for b, n in enumerate(needed):
            self.table[b, :n] = torch.tensor([ids.pop() for _ in range(n)], dtype=torch.int32)
            for at in range(contexts[b]):
                where = int(self.table[b, at // page]), at % page
                self.cache.k[where], self.cache.v[where] = self.k[b][at], self.v[b][at]

    def block(self, full):
        rows = [x[c:c + self.width] for x, c in zip(full, self.contexts, strict=True)]
        return torch.stack(rows) if rows else self.q.new_empty((0, self.width, *self.cache.k.shape[2:]))

    def args(self):
        return self.q, self.block(self.k), self.block(self.v), self.cache, self.table, self.lens

    def run(self, **options):
        return block_attention(*self.args(), **options)

    def expect(self, wide=True, block_lens=None, context_starts=None, causal=False, window=(-1, -1), sinks=None,
               softcap=0.0, scale=None):
        q, k, v, cache, table, lens = self.args()
        k_cache, v_cache, scales = cache.k, cache.v, (cache.k_scale, cache.v_scale)
        if wide:
            q, k, v, k_cache, v_cache, sinks = doubles(q, k, v, k_cache, v_cache, sinks)
            k_cache, v_cache = (t if s is None else t * s.double().reshape(-1, 1)
                                for t, s in zip((k_cache, v_cache), scales, strict=True))
            scales = None, None
        out = torch.zeros_like(q)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        reference.attention.block_attention(q, k, v, k_cache, v_cache, *scales, table, lens, block_lens, context_starts,
                                            None, q.shape[1], scale, causal, *window, sinks, softcap, out)
        return out

    def check(self, factor=2.0, **options):
        got = self.run(**options)
        assert_within_budget(got, self.expect(**options), self.expect(wide=False, **options), factor=factor,
                             name=str(options))
        return got


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def check_packed_blocks(run, case, lens, starts, rows, **options):
    """Blocks of `lens` tokens that begin at rows `starts` of `rows` give the bits of blocks that are padded; rows of no
    request are NaN and stay as they are."""
    q, k, v, cache, table, contexts = case.args()

    def packed(padded):
        to = torch.full((rows, *padded.shape[2:]), NAN, dtype=padded.dtype)
        for b, (start, n) in enumerate(zip(starts, lens, strict=True)):
            to[start:start + n] = padded[b, :n]
        return to

    want = torch.zeros_like(q)
    run(q, k, v, cache, table, contexts, block_lens=ints(*lens), out=want, **options)
    got = torch.full((rows, *q.shape[2:]), NAN, dtype=q.dtype)
    run(*map(packed, (q, k, v)), cache, table, contexts, block_lens=ints(*lens), block_starts=ints(*starts),
        max_block=case.width, out=got, **options)
    assert same_bits(got, packed(want))


def check_rows_beside_what_is_not_finite(run, case, left):
    """case: one request, its first context longer than `left`. A value that is infinite or NaN, or a key that is NaN,
    which some rows of the block see and some do not: those that do not have the bits of a run without it."""
    context, options = case.contexts[0], {"causal": True, "window": (left, -1)}
    clean = run(case, **options)
    assert clean.isfinite().all()
    for which, bad in (("v", float("inf")), ("v", -float("inf")), ("v", NAN), ("k", NAN)):
        for at in (context - left + 1, context + 3):
            places = [getattr(case, which)[0][at]]
            if at < context:
                places.append(getattr(case.cache, which)[int(case.table[0, at // case.page]), at % case.page])
            kept = [place.clone() for place in places]
            for place in places:
                place.fill_(NAN if case.cache.is_fp8 else bad)  # fp8 has no infinity
            got = run(case, **options)
            for place, value in zip(places, kept, strict=True):
                place.copy_(value)
            for i in range(case.width):
                if context + i - left <= at <= context + i:
                    assert not got[0, i].isfinite().any(), (which, bad, at, i)
                else:
                    assert same_bits(got[0, i], clean[0, i]), (which, bad, at, i)
