"""On the GPU: a row of linear, of the head, of experts and of attention has the same bits whatever stands beside it."""

import pytest
import torch
import torch.nn.functional as F

import dflash_kernels as dk
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.testing import assert_within_budget, same_bits
from tests.support import fp8_cases
from tests.support.attention_cases import Case, check_rows_beside_what_is_not_finite, ints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def problem(dtype, rows, n, k):
    x, w = torch.randn(rows, k, device="cuda").to(dtype), (torch.randn(n, k, device="cuda") / k**0.5).to(dtype)
    return x, w, torch.randn(n, device="cuda").to(dtype)


# K of one chunk and of several, shared out and not; tails of every kind
@pytest.mark.parametrize("n,k", [(576, 576), (1000, 1536), (4096, 4096), (40_000, 2048), (100, 3000), (33, 45)])
def test_linear_and_the_head_give_a_row_one_answer(dtype, n, k):
    x, w, b = problem(dtype, 300, n, k)
    whole = dk.linear(x, w, b)
    peer = F.linear(x, w, b)
    assert_within_budget(whole, F.linear(x.double(), w.double(), b.double()), peer, ulps=2)
    assert same_bits(dk.linear(x, dk.pack_weight(w), b), whole)
    firsts = dk.lm_head_topk(x, w, 16, bias=b)
    assert torch.equal(firsts[1], whole.float().topk(16).values)
    assert torch.equal(whole.float().gather(1, firsts[0]), firsts[1])
    assert_within_budget(firsts[2], whole.double().logsumexp(-1), whole.float().logsumexp(-1), ulps=2)
    for start, rows in ((0, 1), (299, 1), (7, 3), (8, 16), (20, 17), (40, 33), (100, 65), (101, 128), (60, 129)):
        part = x[start:start + rows]
        assert same_bits(dk.linear(part, w, b), whole[start:start + rows]), (start, rows)
        ids, values = dk.lm_head_argmax(part, w, bias=b)
        best = whole[start:start + rows].float()
        assert torch.equal(values, best.max(-1).values), (start, rows)
        assert torch.equal(ids, (best == values[:, None]).int().argmax(-1)), (start, rows)
        got = dk.lm_head_topk(part, w, 16, bias=b)
        assert all(same_bits(a, t[start:start + rows]) for a, t in zip(got, firsts, strict=True)), (start, rows)


@pytest.mark.parametrize("rows", [1, 24, 300])  # whose tiles have 16 rows, and 32 that a launch of its own finds
def test_experts_give_a_row_one_answer_whoever_arrives_last(dtype, rows):
    """And in a graph, whose counts hold what the replay before left."""
    experts, hidden, inner = 16, 1000, 200
    make = lambda *shape: torch.randn(shape, device="cuda").to(dtype)  # noqa: E731
    x, weights = make(rows, hidden), (make(experts, 2 * inner, hidden) / 30, make(experts, hidden, inner) / 14)
    routed = dk.route_experts(make(rows, experts), 8)
    whole = dk.expert_mlp(x, *weights, *routed)
    for part in (slice(1), slice(rows - 1, rows), slice(rows // 3, rows // 3 + (rows + 1) // 2)):
        got = dk.expert_mlp(x[part], *weights, *(t[part].contiguous() for t in routed))
        assert same_bits(got, whole[part]), part
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dk.expert_mlp(x, *weights, *routed)
    for _ in range(100):
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, whole)


def on_gpu(case):
    case.q, case.lens, case.table = case.q.cuda(), case.lens.cuda(), case.table.cuda()
    case.k, case.v = [t.cuda() for t in case.k], [t.cuda() for t in case.v]
    case.cache = PagedKV(*(None if t is None else t.cuda() for t in vars(case.cache).values()))
    return case


@pytest.mark.parametrize("heads,kv_heads,dim,page", [(32, 8, 128, 16), (9, 3, 64, 1), (8, 2, 256, 64), (6, 1, 80, 16)])
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": (300, -1), "softcap": 4.0}], ids=str)
def test_p22_p23_attention_gives_a_row_one_answer(dtype, heads, kv_heads, dim, page, options):
    start, total = 1020, 16
    case = on_gpu(Case([start + total, 70], total, heads, kv_heads, dim, page, dtype))
    lens = ints(start, 70).cuda()
    k, v = (torch.stack([x[0][start:start + total], x[1][70:]]) for x in (case.k, case.v))
    whole = dk.block_attention(case.q, k, v, case.cache, case.table, lens, **options)
    for width in (1, 3, 8, total):
        for i in range(0, total, width):
            got = dk.block_attention(case.q[:1, i:i + width], k[:1, i:i + width], v[:1, i:i + width], case.cache,
                                     case.table[:1], ints(start + i).cuda(), **options)
            assert same_bits(got[0], whole[0, i:i + width]), (width, i)
    many = [t.repeat_interleave(150, 0) for t in (case.q, k, v, case.table, lens)]  # too many to share out splits
    got = dk.block_attention(*many[:3], case.cache, *many[3:], **options)
    assert same_bits(got[::150].contiguous(), whole) and same_bits(got[149::150].contiguous(), whole)


@pytest.mark.parametrize("heads,kv_heads,dim,cache", [(32, 8, 128, "model"), (9, 3, 64, "model"), (8, 2, 256, "model"),
                                                      (32, 8, 128, "fp8"), (9, 3, 64, "fp8")])
def test_a2_a_row_beside_one_that_sees_what_is_not_finite_has_its_bits(dtype, heads, kv_heads, dim, cache):
    """Where a sum is not finite the tile is computed again, a few columns of the values at a time: another instruction,
    the same bits. With 300 positions in one launch, and with splits that a second launch combines."""
    def run(case, **options):
        return dk.block_attention(*on_gpu(case).args(), **options)

    if cache == "fp8" and dtype == torch.float32 and dim > 64:
        pytest.skip("float32 queries over an fp8 cache have a kernel up to heads of 64")
    for context, left in ((310, 300), (2050, 1030)):
        case = Case([context], 16, heads, kv_heads, dim, 16, dtype)
        check_rows_beside_what_is_not_finite(run, fp8_cases.quantise(case, "none") if cache == "fp8" else case, left)
