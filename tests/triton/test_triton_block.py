import pytest
import torch

from dflash_kernels import PreparedBlock, reference
from dflash_kernels._triton.block import embed_tokens, prepare_block
from dflash_kernels.testing import same_bits
from tests.kernels.test_block import MASK, batch, fields, from_reference, int32
from tests.support.op_samples import prepared


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def run(anchors, lens, q, page_table=None, page_size=1, block_lens=None, embedding=None):
    """Into tensors inside canaries, whose rows are not adjacent."""
    out = prepared(anchors.shape[0], q, 1 if embedding is None else embedding.shape[1])
    rows = None if embedding is None else torch.full((anchors.shape[0], q + 2, embedding.shape[1] + 4), 7.0).to(
        embedding.dtype)[:, 1:-1, 2:-2]
    out = PreparedBlock(out.ids, out.positions, None if page_table is None else out.slots, rows)
    assert prepare_block(anchors, lens, MASK, page_table, page_size, block_lens, embedding, 0, out.ids, out.positions,
                         out.slots, out.rows) is None
    for _, t in fields(out):
        untouched = t._base == (t._base.flatten()[0] if t._base.numel() else 0)
        assert untouched.sum() >= t._base.numel() - t.numel(), "a neighbour was written"
    return out


@pytest.mark.parametrize("q,page", [(1, 1), (8, 4), (5, 3), (3, 16)])
@pytest.mark.parametrize("b", [0, 1, 5])
def test_block_matches_reference(dtype, b, q, page):
    anchors, lens, table = batch(q, page, b, max_pages=20)
    embedding = torch.randn(100, 24).to(dtype)
    widths = torch.randint(0, q + 1, (b,)).to(torch.int32)
    for options in (dict(page_table=table, page_size=page, block_lens=widths, embedding=embedding), {}):
        got, want = run(anchors, lens, q, **options), from_reference(anchors, lens, q, **options)
        for name, t in fields(want):
            assert same_bits(getattr(got, name).contiguous(), t), name


def test_p18_no_slot_in_a_page_that_the_request_does_not_own():
    table = int32(7, 8, 9, -1, 2**31 - 1, 5).view(3, 2)
    got = run(torch.tensor([1, 1, 1]), int32(6, 2, 0), 4, page_table=table, page_size=4)
    high = (2**31 - 1) * 4
    assert got.slots.tolist() == [[34, 35, -1, -1], [38, 39, -1, -1], [high, high + 1, high + 2, high + 3]]
    assert run(torch.tensor([1]), int32(0), 2, page_table=table[:1, :0], page_size=4).slots.tolist() == [[-1, -1]]


def test_p34_an_anchor_outside_the_table_embeds_to_zero(dtype):
    embedding = torch.randn(MASK + 1, 8).to(dtype)
    got = run(torch.tensor([MASK + 1, -1, 2**40]), int32(0, 0, 0), 2, embedding=embedding)
    assert not got.rows[:, 0].any() and same_bits(got.rows[0, 1], embedding[MASK])
    assert got.ids[:, 0].tolist() == [MASK + 1, -1, 2**40]


@pytest.mark.parametrize("width", [1, 33, 1024, 2500])
def test_embed_tokens_gathers_rows_and_zeroes_unknown_ids(dtype, width):
    ids = torch.randint(-2, 9, (3, 9))[:, 2:7]
    for table in (torch.randn(14, width + 6).to(dtype)[::2, 2:2 + width], torch.randint(-2**60, 2**60, (7, width))):
        out, want = (torch.full((3, 7, width + 4), 7, dtype=table.dtype) for _ in range(2))
        reference.block.embed_tokens(ids, table, 0, want[:, 1:6, 2:-2])
        assert embed_tokens(ids, table, 0, out[:, 1:6, 2:-2]) is None
        assert same_bits(out, want)
    embed_tokens(ids, table[:0], 0, out[:, 1:6, 2:-2])
    assert not out[:, 1:6, 2:-2].any()
