"""How block_attention shares out its spans: which there are, and how many programs take them."""

import pytest
import torch
import triton
import triton.language as tl

from dflash_kernels._triton import attention
from dflash_kernels._triton.attention_span import EACH, SPAN, begin_of, octaves_of, share_of, span_of, spans_in

FAR = attention.FAR


@triton.jit
def _spans(positions, found, begins, octaves, SPAN: tl.constexpr, EACH: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    span = span_of(tl.load(positions + n), octaves, SPAN, EACH)
    tl.store(found + n, span)
    tl.store(begins + n, begin_of(span, octaves, SPAN, EACH))


@triton.jit
def _shares(out, shares, first, end, octaves, SPAN: tl.constexpr, EACH: tl.constexpr):
    begin, last = share_of(tl.program_id(0), shares, first, end, octaves, SPAN, EACH)
    tl.store(out + tl.program_id(0) * 2, begin)
    tl.store(out + tl.program_id(0) * 2 + 1, last)


def spans(positions, octaves, span=SPAN, each=EACH):
    """(the span, its begin) of each position."""
    found, begins = torch.zeros_like(positions), torch.zeros_like(positions)
    _spans[1,](positions, found, begins, octaves, span, each, len(positions))
    return found, begins


def shared(shares, first, end, octaves=19, span=SPAN, each=EACH):
    """[begin, end) of the spans of each program."""
    out = torch.empty(shares, 2, dtype=torch.int32)
    _shares[shares,](out, shares, first, end, octaves, span, each)
    return out.tolist()


@pytest.mark.parametrize("span,each,octaves", [(16, 2, 19), (16, 2, 3), (16, 4, 0), (64, 8, 1)])
def test_spans_lie_side_by_side_and_grow_with_their_octave(span, each, octaves):
    found, begins = spans(torch.arange(4096, dtype=torch.int32), octaves, span, each)
    sizes = found.bincount().tolist()
    assert found[0] == 0 and set((found[1:] - found[:-1]).tolist()) == {0, 1}
    firsts = [0, *(torch.nonzero(found[1:] - found[:-1]).flatten() + 1).tolist()]
    assert begins.tolist() == [firsts[i] for i in found.tolist()]
    for number, size in enumerate(sizes[:-1]):
        assert size == span << min(max(number // each - 1, 0), octaves)
    for reach in (1, span, span + 1, 2 * each * span, 2 * each * span + 1, 1000, 4096):
        assert spans_in(reach, octaves, span, each) == found[reach - 1] + 1
        most = max(int(found[at + reach - 1] - found[at]) + 1 for at in range(4096 - reach + 1))
        assert most <= spans_in(reach, octaves, span, each) + 1


def test_positions_up_to_a_billion_have_spans():
    positions = torch.tensor([-1, 0, 127, 128, 2047, 2048, 131_072, 2**30 - 1], dtype=torch.int32)
    found, begins = spans(positions, 19)
    assert found.tolist() == [-1, 0, 0, 1, 15, 16, 64, 167]
    assert begins.tolist()[1:] == [0, 0, 128, 1920, 2048, 131_072, 2**30 - 2**26]


@pytest.mark.parametrize("window,longest", [(0, 128), (1024, 128), (2047, 128), (2048, 256), (4096, 512),
                                            (FAR, 1 << 26)])
def test_spans_are_no_longer_than_an_eighth_of_the_window(window, longest):
    assert SPAN << octaves_of(window, SPAN, EACH) == longest <= max(SPAN, window // 8)


@pytest.mark.parametrize("first,end", [(0, 1), (0, 1040), (5, 300), (127, 129), (1000, 1024), (3000, 40_000)])
@pytest.mark.parametrize("shares", [1, 2, 3, 16, 40])
def test_shares_are_side_by_side_and_have_every_span(first, end, shares):
    found, _ = spans(torch.tensor([first, end - 1], dtype=torch.int32), 19)
    at = int(found[0])
    for begin, last in shared(shares, first, end):
        assert begin == at <= last
        at = last
    assert at == found[1] + 1


# ---- programs ------------------------------------------------------------------------------------------------------

class Launches(list):
    """Takes the kernels' place."""

    def kernel(self, name):
        class Kernel:
            def __getitem__(_, grid):  # noqa: N805
                return lambda *args, **options: self.append((name, grid, args))
        return Kernel()


def launched(monkeypatch, batch, capacity, width=16, left=-1):
    """Launches of a layer of Qwen3-8B on an H100."""
    launches = Launches()
    monkeypatch.setattr(attention, "generation", lambda device: 9)
    for name in ("block_attention_kernel", "merge_spans_kernel"):
        monkeypatch.setattr(attention, name, launches.kernel(name))

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, kv, cache = meta(batch, width, 32, 128), meta(batch, width, 8, 128), meta(9, 16, 8, 128)
    attention.block_attention(q, kv, kv, cache, cache, None, None, meta(batch, capacity // 16, dtype=torch.int32),
                              meta(batch, dtype=torch.int32), None, None, 0.1, False, left, -1, None, 0.0, q)
    return launches


# requests, room in the page table, context; programs that are launched, and find spans
@pytest.mark.parametrize("batch,capacity,context,programs,live", [
    (1, 2_048, 1_024, 128, 72), (1, 40_960, 8_192, 128, 128), (8, 40_960, 1_024, 128, 128),
    (8, 40_960, 8_192, 128, 128), (4, 131_072, 32_768, 128, 128), (4, 131_072, 131_000, 128, 128),
    (8, 131_072, 8_192, 128, 128), (16, 40_960, 8_192, 128, 128), (64, 40_960, 8_192, 512, 512)], ids=str)
def test_programs_follow_the_chip_and_not_the_page_table(monkeypatch, batch, capacity, context, programs, live):
    launches = launched(monkeypatch, batch, capacity)
    name, (tasks, shares), _ = launches[0]
    assert name == "block_attention_kernel" and len(launches) == 1 + (shares > 1)
    assert tasks * shares == programs <= max(132, tasks)
    work = shared(shares, 0, context + 16)
    assert tasks * sum(begin < last for begin, last in work) == live


@pytest.mark.parametrize("tasks,shares", [(1, 64), (8, 16), (64, 2), (72, 3), (128, 1), (132, 1), (136, 4), (192, 2),
                                          (256, 1), (512, 1), (4000, 1)])
def test_as_many_programs_share_a_task_as_end_it_soonest(tasks, shares):
    assert attention.shares_of(tasks, 64, 132) == shares
    assert attention.shares_of(tasks, 1, 132) == 1


@pytest.mark.parametrize("left", [-1, 128, 1024, 32_768])
def test_what_is_left_to_merge_stays_within_its_bound(monkeypatch, left):
    """256 MB, and no more than 48 of a request for a million positions."""
    shared_out = 0
    for batch in (1, 2, 4, 8, 12, 16, 20, 40, 64):
        for capacity in (2_048, 40_960, 131_072, 1 << 20):
            launches = launched(monkeypatch, batch, capacity, left=left)
            if len(launches) > 1:
                part, tops = launches[1][2][:2]
                assert (part.numel() + tops.numel()) * 4 <= min(256 << 20, (48 << 20) * batch), (batch, capacity)
                shared_out += 1
    assert shared_out >= 16
