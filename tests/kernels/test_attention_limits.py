"""block_attention where scores are far below 0, and where lengths say what cannot be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_kernels import block_attention
from dflash_kernels.limits import FP8
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.testing import assert_within_budget, same_bits
from tests.support.attention_cases import Case, ints

LARGEST, INF = 2**31 - 1, float("inf")


def reference_run(case, **options):
    return case.expect(wide=False, **options)


def check_scores_of_minus_524288(run, contexts=(300, 0), **sizes):
    """Every q.k is -64 * 64 * 128, which a finite sentinel for "not seen" would be above."""
    case = Case(contexts, width=3, heads=2, kv_heads=1, dim=128, **sizes)
    case.q.fill_(-64.0)
    for k in (*case.k, case.cache.k):
        k.fill_(64.0)
    for options in ({}, {"causal": True}, {"window": (200, 0)}, {"sinks": torch.full((2,), -524288.0)}):
        got = run(case, scale=1.0, **options)
        assert_within_budget(got, case.expect(scale=1.0, **options), reference_run(case, scale=1.0, **options))
        assert got.float().abs().amax(-1).min() > 1e-3
        if options == {"causal": True}:
            for b, context in enumerate(contexts):
                means = torch.stack([case.v[b][:context + i + 1].double().mean(0)[0] for i in range(3)])
                torch.testing.assert_close(got[b, :, 0].double(), means, rtol=2e-2, atol=2e-2)


def test_scores_of_minus_524288_are_a_mean_and_no_zeros(isa, dtype):
    check_scores_of_minus_524288(Case.run, dtype=dtype)


def test_scores_of_minus_524288_are_a_mean_in_the_reference():
    check_scores_of_minus_524288(reference_run)


def test_scores_of_minus_524288_over_an_fp8_cache(isa, dtype):
    """The cache's keys and values are 1 and 64, which it holds exactly."""
    case = Case([300, 5], width=3, heads=2, kv_heads=1, dim=128, dtype=dtype)
    case.q.fill_(-64.0)
    for k, v in ((case.cache.k, case.cache.v), *zip(case.k, case.v, strict=True)):
        k.fill_(64.0)
        v.fill_(1.0)
    case.cache = PagedKV(case.cache.k.to(FP8), case.cache.v.to(FP8))
    torch.testing.assert_close(case.run(scale=1.0), torch.ones_like(case.q), rtol=1e-2, atol=0)


# ---- a context that the page table cannot hold ---------------------------------------------------------------------

def check_a_context_beyond_the_table(run, beyond, **sizes):
    """Rows that see any of it are NaN, and no other row is, of this request or of another."""
    case = Case([20, 70, 3], width=4, heads=2, kv_heads=1, dim=32, **sizes)
    capacity = case.table.shape[1] * case.page
    case.lens[0] = beyond(capacity)
    for options in ({}, {"causal": True}, {"window": (2, 1)}, {"window": (0, 0)}, {"sinks": torch.tensor([1.0, -INF])},
                    {"context_starts": ints(LARGEST, 0, 0)}, {"context_starts": ints(16, 8, 0)},
                    {"block_lens": ints(LARGEST, 9, -LARGEST - 1)}):
        got, want = run(case, **options), reference_run(case, **options)
        assert torch.equal(got[:2].isnan(), want[:2].isnan()), options
        left, blind = options.get("window", (LARGEST, 0))[0], "context_starts" in options
        for i in range(4):
            sees = i < left and not (blind and int(options["context_starts"][0]) >= int(case.lens[0]))
            assert got[0, i].isnan().all() if sees else not got[0, i].isnan().any(), (options, i)
        if options.get("window") == (2, 1):
            torch.testing.assert_close(got[0, 2:].float(), want[0, 2:].float(), rtol=1e-2, atol=1e-2)
    alone = Case([20, 70, 3], width=4, heads=2, kv_heads=1, dim=32, **sizes)
    assert same_bits(run(case)[1:], run(alone)[1:])


BEYOND = [lambda n: n + 1, lambda n: n + 256, lambda n: 10**8, lambda n: LARGEST]


@pytest.mark.parametrize("beyond", BEYOND, ids=["1", "256", "1e8", "largest"])
def test_a_context_beyond_the_page_table_ends_and_is_nan(isa, dtype, beyond):
    """2**31 - 1 was walked position by position, for minutes."""
    check_a_context_beyond_the_table(Case.run, beyond, dtype=dtype)


@pytest.mark.parametrize("beyond", BEYOND, ids=["1", "256", "1e8", "largest"])
def test_a_context_beyond_the_page_table_ends_in_the_reference(beyond):
    check_a_context_beyond_the_table(reference_run, beyond)


def test_a_table_or_a_cache_without_pages_ends(isa):
    case = Case([20, 0], dim=32)
    q, k, v, cache, table, _ = case.args()
    for lens, some in ((ints(LARGEST, 0), table[:, :0]), (ints(LARGEST, 0), table)):
        for pages in (cache, PagedKV(cache.k[:0], cache.v[:0])):
            got = block_attention(q, k, v, pages, some, lens)
            assert got[0].isnan().all() and not got[1].isnan().any()


LENGTHS = st.sampled_from([-LARGEST - 1, -1, 0, 1, 2, 3, 5, 15, 16, 17, 40, 63, 64, 65, 66, 10**6, LARGEST])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lengths_give_what_the_reference_gives(data):
    case = Case([40, 64], width=3, heads=2, kv_heads=1, dim=16)
    case.lens = ints(*(data.draw(LENGTHS) for _ in range(2)))
    case.table[data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3))] = data.draw(LENGTHS)
    for pages in (case.cache.k, case.cache.v):
        pages.copy_(torch.randn(pages.shape, generator=torch.Generator().manual_seed(1)))
    options = {name: ints(*(data.draw(LENGTHS) for _ in range(2))) for name in ("block_lens", "context_starts")
               if data.draw(st.booleans())}
    options |= {"causal": data.draw(st.booleans()), "window": data.draw(st.sampled_from([(-1, -1), (5, 2), (2, 0)]))}
    got, want = torch.full_like(case.q, 7.0), case.expect(**options)
    block_attention(*case.args(), out=got, **options)
    for b in range(2):
        rows = min(max(int(options.get("block_lens", ints(3, 3))[b]), 0), 3)
        torch.testing.assert_close(got[b, :rows].double(), want[b, :rows], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert (got[b, rows:] == 7).all()
