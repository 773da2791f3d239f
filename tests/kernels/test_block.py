import pytest
import torch

from dflash_kernels import PreparedBlock, StepGraph, embed_tokens, prepare_block, reference
from dflash_kernels.testing import same_bits

MASK = 90
ABSURD = 2**31 - 1


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def fields(block):
    return [(n, getattr(block, n)) for n in ("ids", "positions", "slots", "rows") if getattr(block, n) is not None]


def from_reference(anchors, lens, q, page_table=None, page_size=1, block_lens=None, embedding=None):
    shape = (anchors.shape[0], q)
    ids, positions = (torch.full(shape, -7) for _ in range(2))
    slots = None if page_table is None else torch.full(shape, -7)
    rows = None if embedding is None else torch.full((*shape, embedding.shape[1]), 7.0).to(embedding.dtype)
    reference.block.prepare_block(anchors, lens, MASK, page_table, page_size, block_lens, embedding, 0, ids, positions,
                                  slots, rows)
    return PreparedBlock(ids, positions, slots, rows)


def batch(q, page, b=5, max_pages=6):
    """Requests whose blocks begin and end on both sides of a page boundary, with only the pages they need."""
    lens = int32(*[max(0, n) for n in (0, page - 1, page, page + 1, 2 * page - q)][:b])
    table = torch.full((b, max_pages), ABSURD, dtype=torch.int32)
    pages = torch.randperm(b * max_pages).to(torch.int32)
    for i, n in enumerate(lens.tolist()):
        needed = min(max_pages, (n + q - 1) // page + 1)
        table[i, :needed] = pages[i * max_pages:i * max_pages + needed]
    return torch.randint(0, MASK, (b,)), lens, table


@pytest.mark.parametrize("q", [1, 3, 8, 16])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_block_equals_the_definition_token_by_token(isa, q, page):
    anchors, lens, table = batch(q, page, max_pages=40)
    widths = int32(q, 0, max(q - 1, 0), q, 1)
    got = prepare_block(anchors, lens, q, MASK, page_table=table, page_size=page, block_lens=widths)
    for b in range(5):
        for i in range(q):
            live, p = i < widths[b], int(lens[b]) + i
            assert got.ids[b, i] == (anchors[b] if live and i == 0 else MASK)
            assert got.positions[b, i] == (p if live else 0)
            assert got.slots[b, i] == (int(table[b, p // page]) * page + p % page if live else -1)


@pytest.mark.parametrize("q,page", [(1, 1), (8, 4), (16, 16), (5, 3)])
@pytest.mark.parametrize("b", [0, 1, 5])
def test_block_matches_reference(isa, dtype, q, page, b):
    anchors, lens, table = batch(q, page, b)
    embedding = torch.randn(100, 24).to(dtype)
    widths = torch.randint(0, q + 1, (b,)).to(torch.int32)
    got = prepare_block(anchors, lens, q, MASK, page_table=table, page_size=page, block_lens=widths,
                        embedding=embedding)
    want = from_reference(anchors, lens, q, table, page, widths, embedding)
    for name, t in fields(want):
        assert same_bits(getattr(got, name), t), name


def test_p12_the_anchor_is_in_slot_0_and_masks_everywhere_else(isa):
    got = prepare_block(torch.tensor([11, 12]), int32(3, 40), 8, MASK)
    assert got.ids.tolist() == [[11] + [MASK] * 7, [12] + [MASK] * 7]
    assert got.positions.tolist() == [list(range(3, 11)), list(range(40, 48))]
    assert got.slots is None and got.rows is None


def test_p13_positions_are_absolute_at_a_long_context(isa):
    got = prepare_block(torch.tensor([1]), int32(2**31 - 4), 4, MASK)
    assert got.positions.tolist() == [[2**31 - 4, 2**31 - 3, 2**31 - 2, 2**31 - 1]]


def test_p17_rows_past_a_request_s_length_are_written_nowhere(isa, dtype):
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    embedding = torch.randn(100, 8).to(dtype)
    got = prepare_block(torch.tensor([1, 2, 3]), int32(5, 5, 5), 4, MASK, page_table=table, page_size=4,
                        block_lens=int32(0, 2, 4), embedding=embedding)
    assert got.ids.tolist() == [[MASK] * 4, [2] + [MASK] * 3, [3] + [MASK] * 3]
    assert got.positions.tolist() == [[0] * 4, [5, 6, 0, 0], [5, 6, 7, 8]]
    assert got.slots.tolist() == [[-1] * 4, [21, 22, -1, -1], [37, 38, 39, 40]]
    assert not got.rows[0].any() and not got.rows[1, 2:].any()
    assert same_bits(got.rows[2, 1], embedding[MASK]) and same_bits(got.rows[1, 0], embedding[2])


def test_p18_no_slot_in_a_page_that_the_request_does_not_own(isa):
    # Request 0 runs past its last page, request 1 into an entry of -1, request 2 past a table of absurd neighbours.
    wide = torch.full((3, 6), ABSURD, dtype=torch.int32)
    wide[:, 1:3] = torch.tensor([[7, 8], [9, -1], [4, 5]], dtype=torch.int32)
    got = prepare_block(torch.tensor([1, 1, 1]), int32(6, 2, 8), 4, MASK, page_table=wide[:, 1:3], page_size=4)
    assert got.slots.tolist() == [[34, 35, -1, -1], [38, 39, -1, -1], [-1] * 4]
    none = prepare_block(torch.tensor([1]), int32(0), 4, MASK, page_table=wide[:1, :0], page_size=4)
    assert none.slots.tolist() == [[-1] * 4]


def test_slots_are_64_bit(isa):
    got = prepare_block(torch.tensor([1]), int32(15), 1, MASK, page_table=int32(ABSURD)[None], page_size=16)
    assert got.slots.item() == ABSURD * 16 + 15


def test_p34_an_anchor_outside_the_table_embeds_to_zero(isa, dtype):
    embedding = torch.randn(MASK + 1, 8).to(dtype)
    got = prepare_block(torch.tensor([MASK + 1, -1, 2**40]), int32(0, 0, 0), 2, MASK, embedding=embedding)
    assert not got.rows[:, 0].any() and same_bits(got.rows[0, 1], embedding[MASK])
    assert got.ids[:, 0].tolist() == [MASK + 1, -1, 2**40]


def test_strided_inputs_and_outputs_leave_their_neighbours_alone(isa, dtype):
    b, q, h = 4, 3, 8
    anchors = torch.arange(20).view(4, 5)[:, 2]
    table = torch.full((b, 7), ABSURD, dtype=torch.int32)
    table[:, 2:5] = torch.arange(12, dtype=torch.int32).view(4, 3)
    embedding = torch.full((100, 20), float("nan"), dtype=dtype)
    embedding[:, 4:12] = torch.randn(100, 8).to(dtype)
    wide = [torch.full((b, q + 4), -7) for _ in range(3)]
    rows = torch.full((b, q + 2, h + 4), 7.0).to(dtype)
    out = PreparedBlock(*(t[:, 2:2 + q] for t in wide), rows[:, 1:1 + q, 2:2 + h])
    lens, widths = int32(0, 3, 4, 5), int32(3, 2, 0, 3)
    got = prepare_block(anchors, lens, q, MASK, page_table=table[:, 2:5], page_size=4, block_lens=widths,
                        embedding=embedding[:, 4:12], out=out)
    assert got is out
    want = from_reference(anchors, lens, q, table[:, 2:5], 4, widths, embedding[:, 4:12])
    for name, t in fields(want):
        assert same_bits(getattr(out, name), t), name
    for t in wide:
        assert (t[:, :2] == -7).all() and (t[:, 2 + q:] == -7).all()
    rows[:, 1:1 + q, 2:2 + h] = 7.0
    assert (rows == 7).all()


@pytest.mark.parametrize("q", [1, 3, 8, 16])
def test_a_request_alone_equals_the_same_request_in_a_batch(isa, dtype, q):
    anchors, lens, table = batch(q, 4, max_pages=20)
    embedding = torch.randn(100, 40).to(dtype)
    whole = prepare_block(anchors, lens, q, MASK, page_table=table, page_size=4, embedding=embedding)
    again = prepare_block(anchors, lens, q, MASK, page_table=table, page_size=4, embedding=embedding)
    for b in range(5):
        one = slice(b, b + 1)
        alone = prepare_block(anchors[one], lens[one], q, MASK, page_table=table[one], page_size=4, embedding=embedding)
        for name, t in fields(alone):
            assert same_bits(t, getattr(whole, name)[one]) and same_bits(t, getattr(again, name)[one]), name


def test_many_rows(isa, by_threads):
    embedding = torch.randn(500, 256)
    ids = torch.randint(-3, 503, (40, 30))
    want = torch.where(((ids >= 0) & (ids < 500))[..., None], embedding[ids.clamp(0, 499)], 0)
    assert all(same_bits(found, want) for found in by_threads(lambda: embed_tokens(ids, embedding)))


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 4), (2, 0)])
def test_embed_tokens_gathers_rows_and_zeroes_unknown_ids(isa, dtype, shape):
    table = torch.randn(50, 33).to(dtype)
    ids = torch.randint(-2, 52, shape)
    known = (ids >= 0) & (ids < 50)
    got = embed_tokens(ids, table)
    assert got.shape == (*shape, 33)
    assert same_bits(got, torch.where(known[..., None], table[ids.clamp(0, 49)], 0))
    want = torch.full_like(got, 7)
    reference.block.embed_tokens(ids, table, 0, want)
    assert same_bits(got, want)


def test_embed_tokens_strided(isa, dtype):
    table = torch.randn(50, 40).to(dtype)
    ids = torch.randint(0, 50, (3, 9))
    out = torch.full((3, 6, 20), 7.0).to(dtype)
    embed_tokens(ids[:, 1:5] // 2, table[::2, 4:20], out=out[:, 1:5, 2:18])
    assert same_bits(out[:, 1:5, 2:18], table[::2, 4:20][ids[:, 1:5] // 2])
    out[:, 1:5, 2:18] = 7.0
    assert (out == 7).all()
    assert embed_tokens(ids, table[:, :0]).shape == (3, 9, 0)
    assert not embed_tokens(ids, table[:0]).any()


def test_embed_tokens_looks_ids_up_by_ids(isa):
    d2t = torch.arange(30) * 1_000_003 - 7
    ids = torch.tensor([[3, 29], [-1, 30]])
    assert embed_tokens(ids, d2t[:, None]).tolist() == [[[3_000_002], [29_000_080]], [[0], [0]]]


@pytest.mark.skipif(not StepGraph.available(), reason="recorded steps need the C++ library")
def test_p20_a_recorded_block_follows_lengths_and_tables_that_change(isa, dtype):
    anchors, lens, table = batch(8, 4, max_pages=20)
    embedding, widths = torch.randn(100, 16).to(dtype), int32(8, 8, 8, 8, 8)
    options = {"page_table": table, "page_size": 4, "block_lens": widths, "embedding": embedding}
    out = prepare_block(anchors, lens, 8, MASK, **options)
    graph = StepGraph()
    with graph.capture():
        prepare_block(anchors, lens, 8, MASK, out=out, **options)
    anchors.copy_(torch.tensor([5, 4, 3, 2, 1]))
    lens.copy_(int32(1, 0, 20, 7, 8))
    widths.copy_(int32(8, 0, 1, 7, 8))
    table.copy_(torch.randperm(100).to(torch.int32).view(5, 20))
    graph.replay()
    for name, t in fields(from_reference(anchors, lens, 8, table, 4, widths, embedding)):
        assert same_bits(getattr(out, name), t), name


def test_bad_input_names_what_was_expected_and_got():
    a, c = torch.tensor([1, 2]), int32(0, 0)
    table = torch.zeros(2, 2, dtype=torch.int32)
    for message, error, args, kwargs in [
        (r"anchor_ids must be int64 \(B,\); got int32 \(2,\)", TypeError, (a.int(), c, 4, 9), {}),
        (r"context_lens must have shape \(B,\) = \(2\); got int32 \(1,\)", ValueError, (a, c[:1], 4, 9), {}),
        (r"block_size must be at least 1; got 0", ValueError, (a, c, 0, 9), {}),
        (r"block_size must be an int; got float", TypeError, (a, c, 4.0, 9), {}),
        (r"mask_token_id must be at least 0; got -1", ValueError, (a, c, 4, -1), {}),
        (r"page_table and page_size must be given together", ValueError, (a, c, 4, 9), {"page_table": table}),
        (r"page_size must be at least 1", ValueError, (a, c, 4, 9), {"page_table": table, "page_size": 0}),
        (r"page_table must be int32", TypeError, (a, c, 4, 9), {"page_table": table.long(), "page_size": 4}),
        (r"mask_token_id must be a row of embedding, below 9; got 9", ValueError, (a, c, 4, 9),
         {"embedding": torch.zeros(9, 4)}),
        (r"out.slots must be None; page_table decides", ValueError, (a, c, 4, 9),
         {"out": PreparedBlock(*(torch.zeros(2, 4, dtype=torch.int64) for _ in range(3)))}),
        (r"out.ids must have shape \(2, 4\)", ValueError, (a, c, 4, 9),
         {"out": PreparedBlock(*(torch.zeros(2, 5, dtype=torch.int64) for _ in range(2)))}),
        (r"out must be a PreparedBlock; got tuple", TypeError, (a, c, 4, 9), {"out": (a, a)}),
    ]:
        with pytest.raises(error, match="^prepare_block: " + message):
            prepare_block(*args, **kwargs)
    with pytest.raises(TypeError, match=r"^embed_tokens: ids must be int64 \(...\); got int32 \(2,\)"):
        embed_tokens(c, torch.zeros(9, 4))
    with pytest.raises(ValueError, match=r"^embed_tokens: table must have shape \(V, H\)"):
        embed_tokens(a, torch.zeros(9))


def test_values_are_checked_on_request(monkeypatch):
    a, c, e = torch.tensor([1, 2]), int32(0, -1), torch.zeros(9, 4)
    prepare_block(a, c, 4, 8)
    monkeypatch.setenv("DFLASH_CHECK", "1")
    with pytest.raises(ValueError, match="prepare_block: context_lens must be at least 0; got -1"):
        prepare_block(a, c, 4, 8)
    with pytest.raises(ValueError, match=r"prepare_block: block_lens must be in \[0, 4\]"):
        prepare_block(a, int32(0, 0), 4, 8, block_lens=int32(5, 0))
    with pytest.raises(ValueError, match=r"prepare_block: anchor_ids must be in \[0, 9\)"):
        prepare_block(a + 7, int32(0, 0), 4, 8, embedding=e)
