"""Blocks of several lengths, one after another: block_attention with block_starts."""

import pytest
import torch

from dflash_kernels import block_attention
from dflash_kernels.testing import same_bits
from tests.support.attention_cases import Case, check_packed_blocks, ints


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (70, -1)}], ids=str)
def test_packed_blocks_have_the_bits_of_padded_ones(isa, dtype, options):
    case = Case([70, 2, 0, 600, 31], dtype=dtype)
    check_packed_blocks(block_attention, case, [4, 1, 0, 3, 2], [3, 0, 99, 8, 11], 14, **options)


def test_packed_blocks_end_where_their_rows_do(isa):
    case, starts, lens = Case([20, 33, 5]), ints(6, -3, 100), ints(4, 2, 9)
    q, k, v, cache, table, contexts = case.args()
    q, k, v = (t.flatten(0, 1)[:8].clone() for t in (q, k, v))
    out = torch.full_like(q, 7.0)
    block_attention(q, k, v, cache, table, contexts, block_lens=lens, block_starts=starts, max_block=4, out=out)
    for start, n, b in ((6, 2, 0), (0, 2, 1)):
        here = slice(start, start + n)
        alone = block_attention(q[None, here], k[None, here], v[None, here], cache, table[b:b + 1], contexts[b:b + 1])
        assert same_bits(out[here], alone[0]), b
    assert (out[2:6] == 7).all()


@pytest.mark.parametrize(("options", "match"), [
    ({"max_block": None}, "block_starts and max_block must be given together; got int32"),
    ({"block_starts": None}, "block_starts and max_block must be given together; got NoneType"),
    ({"block_lens": None}, "block_lens must be given with block_starts; got None"),
    ({"max_block": 0}, "max_block must be"), ({"block_starts": ints(0)}, "block_starts must have shape"),
    ({"q": torch.zeros(2, 4, 6, 64)}, "q must have shape .T, Hq, D."),
])
def test_packed_blocks_are_checked(options, match):
    q, k, v, cache, table, contexts = Case([20, 33]).args()
    rows = {name: t.flatten(0, 1) for name, t in (("q", q), ("k", k), ("v", v))}
    given = rows | {"block_lens": ints(4, 4), "block_starts": ints(0, 4), "max_block": 4} | options
    with pytest.raises(ValueError, match=f"block_attention: {match}"):
        block_attention(given.pop("q"), given.pop("k"), given.pop("v"), cache, table, contexts, **given)


def test_blocks_that_share_rows_are_an_error_while_values_are_checked(monkeypatch):
    monkeypatch.setenv("DFLASH_CHECK", "1")
    q, k, v, cache, table, contexts = Case([20, 33]).args()
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    for starts in (ints(0, 3), ints(0, 5), ints(-1, 4)):
        with pytest.raises(ValueError, match="block_starts must give each block rows of its own"):
            block_attention(*rows, cache, table, contexts, block_lens=ints(4, 4), block_starts=starts, max_block=4)


@pytest.mark.parametrize("max_block", [5, 2**25, 2**40, 2**62, 2**63 - 1])
def test_a_block_has_no_more_than_all_rows(max_block):
    """Work is counted by max_block: rows that nobody has are none."""
    q, k, v = torch.randn(4, 4, 16), torch.randn(4, 2, 16), torch.randn(4, 2, 16)
    given = {"block_lens": ints(4), "block_starts": ints(0)}
    want = block_attention(q, k, v, None, None, ints(0), max_block=4, **given)
    assert torch.equal(block_attention(q, k, v, None, None, ints(0), max_block=max_block, **given), want)
