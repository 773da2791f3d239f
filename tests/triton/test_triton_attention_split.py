"""How block_attention shares out its splits: which there are, and how many programs take them."""

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from dflash_kernels._triton import attention
from dflash_kernels._triton.attention_split import EACH, SPLIT, begin_of, octaves_of, share_of, split_of, splits_in
from dflash_kernels.testing import same_bits
from tests.support.attention_cases import Case
from tests.support.launches import launches
from tests.triton.test_triton_attention import launch

FAR = attention.FAR


@triton.jit
def _splits(positions, found, begins, octaves, SPLIT: tl.constexpr, EACH: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    split = split_of(tl.load(positions + n), octaves, SPLIT, EACH)
    tl.store(found + n, split)
    tl.store(begins + n, begin_of(split, octaves, SPLIT, EACH))


@triton.jit
def _shares(out, shares, first, end, octaves, SPLIT: tl.constexpr, EACH: tl.constexpr):
    begin, last = share_of(tl.program_id(0), shares, first, end, octaves, SPLIT, EACH)
    tl.store(out + tl.program_id(0) * 2, begin)
    tl.store(out + tl.program_id(0) * 2 + 1, last)


def splits(positions, octaves, split=SPLIT, each=EACH):
    """(the split, its begin) of each position."""
    found, begins = torch.zeros_like(positions), torch.zeros_like(positions)
    _splits[1,](positions, found, begins, octaves, split, each, len(positions))
    return found, begins


def shared(shares, first, end, octaves=19, split=SPLIT, each=EACH):
    """[begin, end) of the splits of each program."""
    out = torch.empty(shares, 2, dtype=torch.int32)
    _shares[shares,](out, shares, first, end, octaves, split, each)
    return out.tolist()


@pytest.mark.parametrize("split,each,octaves", [(16, 2, 19), (16, 2, 3), (16, 4, 0), (64, 8, 1)])
def test_splits_lie_side_by_side_and_grow_with_their_octave(split, each, octaves):
    found, begins = splits(torch.arange(4096, dtype=torch.int32), octaves, split, each)
    sizes = found.bincount().tolist()
    assert found[0] == 0 and set((found[1:] - found[:-1]).tolist()) == {0, 1}
    firsts = [0, *(torch.nonzero(found[1:] - found[:-1]).flatten() + 1).tolist()]
    assert begins.tolist() == [firsts[i] for i in found.tolist()]
    for number, size in enumerate(sizes[:-1]):
        assert size == split << min(max(number // each - 1, 0), octaves)
    for reach in (1, split, split + 1, 2 * each * split, 2 * each * split + 1, 1000, 4096):
        assert splits_in(reach, octaves, split, each) == found[reach - 1] + 1
        most = max(int(found[at + reach - 1] - found[at]) + 1 for at in range(4096 - reach + 1))
        assert most <= splits_in(reach, octaves, split, each) + 1


def test_positions_up_to_a_billion_have_splits():
    positions = torch.tensor([-1, 0, 127, 128, 2047, 2048, 131_072, 2**30 - 1], dtype=torch.int32)
    found, begins = splits(positions, 19)
    assert found.tolist() == [-1, 0, 0, 1, 15, 16, 64, 167]
    assert begins.tolist()[1:] == [0, 0, 128, 1920, 2048, 131_072, 2**30 - 2**26]


@pytest.mark.parametrize("window,longest", [(0, 128), (1024, 128), (2047, 128), (2048, 256), (4096, 512),
                                            (FAR, 1 << 26)])
def test_splits_are_no_longer_than_an_eighth_of_the_window(window, longest):
    assert SPLIT << octaves_of(window, SPLIT, EACH) == longest <= max(SPLIT, window // 8)


@pytest.mark.parametrize("first,end", [(0, 1), (0, 1040), (5, 300), (127, 129), (1000, 1024), (3000, 40_000)])
@pytest.mark.parametrize("shares", [1, 2, 3, 16, 40])
def test_shares_are_side_by_side_and_have_every_split(first, end, shares):
    found, _ = splits(torch.tensor([first, end - 1], dtype=torch.int32), 19)
    at = int(found[0])
    for begin, last in shared(shares, first, end):
        assert begin == at <= last
        at = last
    assert at == found[1] + 1


@pytest.mark.parametrize("table", [attention.CONFIGS, attention.SOFTCAPPED], ids=["CONFIGS", "SOFTCAPPED"])
def test_splits_are_whole_tiles(table):
    """A split ends where a tile does."""
    assert all(SPLIT % c.BLOCK_N == 0 for by in table.values() for c in by.values())


@pytest.mark.parametrize("window", [(-1, -1), (500, -1)], ids=str)
def test_no_bit_of_a_row_follows_the_chip_or_the_tables_room(window, monkeypatch):
    """A request of 700 alone and beside another, in tables for 704 and 40,960, on chips of 1 to 132 multiprocessors."""
    monkeypatch.setattr(attention, "SPLIT", 32)
    monkeypatch.setattr(attention, "EACH", 2)
    shares, shares_of = set(), attention.shares_of

    def noted(*args):
        shares.add(shares_of(*args))
        return shares_of(*args)

    monkeypatch.setattr(attention, "shares_of", noted)
    case, found = Case([700, 20], width=2, heads=2, kv_heads=1, dim=16), []
    q, k, v, cache, pages, lens = case.args()
    for chip, room, batch in ((1, 704, 1), (4, 704, 2), (132, 704, 1), (132, 704, 2), (16, 40_960, 1), (4, 40_960, 2)):
        monkeypatch.setattr(attention, "multiprocessors", lambda device, n=chip: n)
        table = torch.full((2, room // 16), 2**30, dtype=torch.int32)
        table[:, :44] = pages[:, :44]
        found.append(launch(q[:batch], k[:batch], v[:batch], cache, table[:batch], lens[:batch],
                            out=torch.empty_like(q[:batch]), window=window)[0])
    assert len(shares) >= 3 and not found[0].isnan().any() and all(same_bits(x, found[0]) for x in found)


# ---- programs ------------------------------------------------------------------------------------------------------

def launched(batch, capacity, width=16, left=-1):
    """Launches of a layer of Qwen3-8B on an H100, and the bytes that its programs leave to combine."""
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, kv, cache = meta(batch, width, 32, 128), meta(batch, width, 8, 128), meta(9, 16, 8, 128)
    table, lens = meta(batch, capacity // 16, dtype=torch.int32), meta(batch, dtype=torch.int32)
    left_over, empty = [], torch.empty

    def allocated(*shape, **options):
        left_over.append(empty(*shape, **options))
        return left_over[-1]

    with launches() as noted, mock.patch.object(torch, "empty", allocated):
        attention.block_attention(q, kv, kv, cache, cache, None, None, table, lens, None, None, None, q.shape[1], 0.1,
                                  False, left, -1, None, 0.0, q)
    return noted, sum(t.nbytes for t in left_over)


# requests, room in the page table, context; programs that are launched, and of those that find splits. Before: 40 and
# 24; 648 and 24; 648 and 136; 5,184 and 192; 5,184 and 1,088; 32 three times; 64; 128; 512, which all found some.
@pytest.mark.parametrize("batch,capacity,context,programs,live", [
    (1, 2_048, 1_024, 128, 72), (1, 40_960, 1_024, 128, 72), (1, 40_960, 8_192, 128, 128),
    (8, 40_960, 1_024, 128, 128), (8, 40_960, 8_192, 128, 128), (4, 131_072, 1_024, 128, 128),
    (4, 131_072, 32_768, 128, 128), (4, 131_072, 131_000, 128, 128), (8, 131_072, 8_192, 128, 128),
    (16, 40_960, 8_192, 128, 128), (64, 40_960, 8_192, 512, 512)], ids=str)
def test_programs_follow_the_chip_and_not_the_page_table(batch, capacity, context, programs, live):
    noted, _ = launched(batch, capacity)
    name, (tasks, shares) = noted[0]
    assert name == "block_attention_kernel" and len(noted) == 1 + (shares > 1)
    assert tasks * shares == programs <= max(132, tasks)
    work = shared(shares, 0, context + 16)
    assert tasks * sum(begin < last for begin, last in work) == live


@pytest.mark.parametrize("tasks,shares", [(1, 64), (8, 16), (64, 2), (72, 3), (128, 1), (132, 1), (136, 4), (192, 2),
                                          (256, 1), (512, 1), (4000, 1)])
def test_as_many_programs_share_a_task_as_end_it_soonest(tasks, shares):
    assert attention.shares_of(tasks, 64, 132) == shares
    assert attention.shares_of(tasks, 1, 132) == 1


@pytest.mark.parametrize("left", [-1, 128, 1024, 32_768])
def test_what_is_left_to_merge_stays_within_its_bound(left):
    """256 MB, and no more than 48 of a request for a million positions."""
    shared_out = 0
    for batch in (1, 2, 4, 8, 12, 16, 20, 40, 64):
        for capacity in (2_048, 40_960, 131_072, 1 << 20):
            noted, nbytes = launched(batch, capacity, left=left)
            assert (nbytes > 0) == (len(noted) > 1)
            assert nbytes <= min(256 << 20, (48 << 20) * batch), (batch, capacity)
            shared_out += nbytes > 0
    assert shared_out >= 16


def test_some_numbers_of_requests_have_one_program_for_all_splits():
    """A known limit: 13 to 16 nearly fill the chip, and what 20 and more in tables for 40,960 would leave to combine
    is over the bound. If their contexts are unlike, the longest one's takes as long as one program takes for it."""
    assert {n for n in range(1, 65) if launched(n, 40_960)[0][0][1][1] == 1} == {*range(13, 17), *range(20, 65)}
    assert {n for n in range(1, 33) if launched(n, 2_048)[0][0][1][1] == 1} == {*range(13, 17), *range(29, 33)}
