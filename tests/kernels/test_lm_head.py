"""lm_head_topk and combine_topk. What lm_head_argmax does alone is in test_linear.py."""

import pytest
import torch

import dflash_kernels as dk
from dflash_kernels import reference
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

NAN, INF = float("nan"), float("inf")
KS = (1, 2, 3, 16, 17, 64)


def problem(dtype, rows, n, k=64, bias=True):
    x, w = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    return x, w, torch.randn(n).to(dtype) if bias else None


def first(logits, k, id_offset=0):
    """The first k (ids, values) of each row of logits, by the reference."""
    rows = logits.shape[0]
    ids, values = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
    reference.lm_head._first(logits.float(), torch.arange(logits.shape[1]).expand_as(logits) + id_offset, ids, values)
    return ids, values


def lse_of(logits):
    return logits.double().logsumexp(-1)


def equal(a, b):
    """Values and NaN at the same places; which of the two zeros does not matter."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def assert_is_first(got, logits, k, id_offset=0):
    ids, values = first(logits, k, id_offset)
    assert torch.equal(got[0], ids) and equal(got[1], values)
    assert_within_budget(got[2], lse_of(logits), logits.float().logsumexp(-1), name="lse")


@pytest.mark.parametrize("k", KS)
def test_first_k_of_linear_in_every_batch(isa, dtype, k):
    x, w, b = problem(dtype, 128, 1000)
    packed, logits = dk.pack_weight(w), dk.linear(x, w, b)
    whole = dk.lm_head_topk(x, packed, k, bias=b)
    assert_is_first(whole, logits, k)
    assert all(same_bits(a, t) for a, t in zip(dk.lm_head_topk(x, w, k, bias=b), whole, strict=True))
    for rows in (*range(1, 18), 65):
        start = 3 * rows % (128 - rows)
        got = dk.lm_head_topk(x[start:start + rows], packed, k, bias=b)
        assert all(same_bits(a, t[start:start + rows]) for a, t in zip(got, whole, strict=True)), rows
    assert_is_first(dk.lm_head_topk(x[:5], packed, k), dk.linear(x[:5], w), k)


def test_one_candidate_is_argmax_and_empty_rows_are_none(isa, dtype):
    x, w, b = problem(dtype, 20, 700)
    w[350:] = w[:350]
    b[350:] = b[:350]
    ids, values, lse = dk.lm_head_topk(x, w, 1, bias=b, scale=-0.7, softcap=2.0, id_offset=2**40, num_valid=650)
    want = dk.lm_head_argmax(x, w, bias=b, scale=-0.7, softcap=2.0, id_offset=2**40, num_valid=650)
    assert same_bits(ids[:, 0], want[0]) and same_bits(values[:, 0], want[1])
    given = torch.full((20,), NAN)
    got = dk.lm_head_argmax(x, w, bias=b, scale=-0.7, softcap=2.0, id_offset=2**40, num_valid=650, out_lse=given)
    assert all(same_bits(a, t) for a, t in zip((*got, given), (*want, lse), strict=True))
    assert [t.shape for t in dk.lm_head_topk(x[:0], w, 5)] == [(0, 5), (0, 5), (0,)]


def test_p32_p35_padded_and_unmapped_rows_are_never_candidates(isa, dtype):
    x, w, b = problem(dtype, 9, 500)
    for poison in (NAN, INF, 300.0):
        for valid in (1, 2, 15, 16, 17, 127, 128, 129, 250, 499):
            bias = b.clone()
            bias[valid:] = poison
            k = min(valid, 17)
            got = dk.lm_head_topk(x, w, k, bias=bias, num_valid=valid)
            want = dk.lm_head_topk(x, w[:valid], k, bias=b[:valid])
            assert all(same_bits(a, t) for a, t in zip(got, want, strict=True)), (poison, valid)
            assert (got[0] < valid).all()


def test_p33_of_equal_logits_the_lowest_ids(isa, dtype):
    before, threads = torch.get_num_threads(), (1, 3)
    x, w = torch.ones(3, 32, dtype=dtype), torch.zeros(2000, 32, dtype=dtype)
    spread = torch.randperm(2000)[:90].sort().values  # over blocks, units, streams and threads
    try:
        for count in threads:
            torch.set_num_threads(count)
            for k in KS:
                assert dk.lm_head_topk(x, w, k)[0].tolist() == [list(range(k))] * 3
                tied = w.clone()
                tied[spread, 5] = 2
                ids, values, lse = dk.lm_head_topk(x, tied, k)
                assert torch.equal(ids, spread[:k].expand(3, k)) and (values == 2).all()
                assert_within_budget(lse, lse_of(dk.linear(x, tied)), dk.linear(x, tied).float().logsumexp(-1))
    finally:
        torch.set_num_threads(before)


SPECIAL = {"nan": {40: NAN, 3: NAN, 399: NAN, 200: INF}, "late nan": dict.fromkeys(range(64), 40.0) | {390: NAN},
           "inf": {17: INF, 390: INF, 5: -INF},
           "nan after inf": {128: INF, 135: NAN, 136: INF}, "mostly -inf": dict.fromkeys(range(398), -INF),
           "-inf": dict.fromkeys(range(400), -INF), "a unit of -inf": dict.fromkeys(range(128, 256), -INF),
           "one": dict.fromkeys(range(1, 400), -INF), "far apart": {0: -30000.0, 399: 30000.0},
           "very low": dict.fromkeys(range(400), -30000.0), "very high": dict.fromkeys(range(400), 30000.0)}


@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
def test_p33_nan_and_infinities(isa, dtype, values):
    x, w, b = problem(dtype, 5, 400)
    b[list(values)] = torch.tensor(list(values.values())).to(dtype)
    for k in (1, 3, 64):
        assert_is_first(dk.lm_head_topk(x, w, k, bias=b), dk.linear(x, w, b), k)


def test_nan_stays_in_its_row(isa, dtype):
    x, w, _ = problem(dtype, 4, 300)
    clean = dk.lm_head_topk(x, w, 5)
    x[2, 5] = NAN
    got = dk.lm_head_topk(x, w, 5)
    assert got[0][2].tolist() == [0, 1, 2, 3, 4] and got[1][2].isnan().all() and got[2][2].isnan()
    assert all(same_bits(a[[0, 1, 3]], t[[0, 1, 3]]) for a, t in zip(got, clean, strict=True))


def test_p36_multiplier_then_cap_and_the_offset_of_a_shard(isa, dtype):
    x, w, b = problem(dtype, 6, 150)
    options = {"scale": -3.0, "softcap": 5.0}
    # One column at a time, lm_head_argmax gives the logits themselves.
    logits = torch.stack([dk.lm_head_argmax(x, w[i:i + 1], bias=b[i:i + 1], **options)[1] for i in range(150)], 1)
    for k in (2, 16, 64):
        assert_is_first(dk.lm_head_topk(x, w, k, bias=b, id_offset=2**40, **options), logits, k, 2**40)
    want = torch.empty(6, 4, dtype=torch.int64), torch.empty(6, 4).double(), torch.empty(6).double()
    reference.lm_head.lm_head_topk(*doubles(x, w), None, 0, *doubles(b), 150, 150, -3.0, 5.0, 0, *want)
    if dtype == torch.float32:
        assert torch.equal(dk.lm_head_topk(x, w, 4, bias=b, **options)[0], want[0])


def test_bits_do_not_depend_on_threads(isa, dtype, by_threads):
    x, w, b = problem(dtype, 70, 3000)
    packed = dk.pack_weight(w)
    got = by_threads(lambda: dk.lm_head_topk(x, packed, 16, bias=b))
    assert all(same_bits(a, t) for other in got[1:] for a, t in zip(got[0], other, strict=True))
    again = dk.lm_head_topk(x, packed, 16, bias=b)
    assert all(same_bits(a, t) for a, t in zip(got[0], again, strict=True))


def test_outputs_of_one_row_can_be_given_back(isa):
    x, w, _ = problem(torch.float32, 1, 100)
    ids, values = dk.lm_head_argmax(x[0], w)
    assert ids.shape == values.shape == ()
    again = torch.zeros_like(ids), torch.zeros_like(values)
    dk.lm_head_argmax(x[0], w, out_ids=again[0], out_values=again[1])
    assert (ids, values) == again
    *_, lse = dk.lm_head_topk(x[0], w, 3)
    assert dk.lm_head_topk(x[0], w, 3, out_lse=torch.zeros_like(lse))[2] == lse


@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf"), 1e39])
def test_a_soft_cap_is_a_finite_float32(softcap):
    x, w, _ = problem(torch.float32, 1, 100)
    for call in (lambda: dk.lm_head_argmax(x, w, softcap=softcap), lambda: dk.lm_head_topk(x, w, 3, softcap=softcap)):
        with pytest.raises(ValueError, match="softcap must be 0 .none. or positive, and finite; got"):
            call()


@pytest.mark.skipif(not dk.StepGraph.available(), reason="the C++ library is not built")
def test_a_recorded_step_replays_both():
    x, w, _ = problem(torch.bfloat16, 4, 600)
    halves, graph = (dk.pack_weight(w[:256]), dk.pack_weight(w[256:])), dk.StepGraph()
    parts = [torch.empty(2, 4, 5), torch.empty(2, 4, 5, dtype=torch.int64), torch.empty(2, 4)]
    with graph.capture():
        for i, half in enumerate(halves):
            dk.lm_head_topk(x, half, 5, id_offset=256 * i, out_values=parts[0][i], out_ids=parts[1][i],
                            out_lse=parts[2][i])
        out = dk.combine_topk(*parts)
    assert len(graph) == 3
    for _ in range(2):
        x.copy_(torch.randn(4, 64))
        graph.replay()
        assert_is_first(out, dk.linear(x, w), 5)


# ---- combine_topk
# ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cuts", [(), (64,), (100, 164), (400, 500, 599)], ids=str)
@pytest.mark.parametrize("k", [1, 5, 64])
def test_shards_in_any_order_combine_to_the_whole(isa, dtype, cuts, k):
    x, w, b = problem(dtype, 6, 700)
    w[60:70] = w[630:640] = w[0]  # ties across shards
    b[60:70] = b[630:640] = b[0] = 6.0
    edges = [0, *cuts, 700]
    parts = [dk.lm_head_topk(x, w[i:j], k, bias=b[i:j], id_offset=i) for i, j in zip(edges, edges[1:], strict=False)]
    whole = dk.lm_head_topk(x, w, k, bias=b)
    for order in (parts, parts[::-1]):
        ids, values, lse = (torch.stack(t) for t in zip(*order, strict=True))
        got = dk.combine_topk(values, ids, lse)
        assert torch.equal(got[0], whole[0]) and same_bits(got[1], whole[1])
        assert_within_budget(got[2], lse_of(dk.linear(x, w, b)), dk.linear(x, w, b).float().logsumexp(-1))
        if not cuts:
            assert same_bits(got[2], whole[2])


def test_p33_combine_topk_equals_reference(isa):
    choices = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1.5])
    for shards, rows, k in ((1, 40, 3), (3, 40, 17), (2, 3, 64), (5, 300, 2), (2, 0, 4)):
        values = choices[torch.randint(0, 8, (shards, rows, k))]
        ids = torch.stack([torch.randperm(shards * k) for _ in range(rows)], 1) if rows else torch.empty(shards * k, 0)
        ids = ids.long().view(shards, k, rows).transpose(1, 2).contiguous() + 2**40
        lse = torch.cat([choices, torch.tensor([700.0, -700.0])])[torch.randint(0, 10, (shards, rows))]
        want = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k), torch.empty(rows)
        reference.lm_head.combine_topk(values, ids, lse, *want)
        got = dk.combine_topk(values, ids, lse)
        assert torch.equal(got[0], want[0]) and equal(got[1], want[1])
        assert_within_budget(got[2], lse.double().logsumexp(0), want[2])
