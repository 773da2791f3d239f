import pytest
import torch

from dflash_kernels import reference
from dflash_kernels._triton import linear as triton_linear
from dflash_kernels._triton import lm_head as triton_head
from dflash_kernels._triton import lm_head_topk as triton_topk
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def problem(dtype, rows, n, k):
    return torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)


def run(x, w, bias=None, num_valid=None, scale=1.0, softcap=0.0, id_offset=0, scales=None):
    n, boxes = w.shape[0], (torch.full((x.shape[0] + 2,), 77), torch.full((x.shape[0] + 2,), 77.0))
    ids, values = (t[1:-1] for t in boxes)
    valid = n if num_valid is None else num_valid
    assert triton_head.lm_head_argmax(x, w, scales, 0, bias, n, valid, scale, softcap, id_offset, ids, values) is None
    assert all((t[[0, -1]] == 77).all() for t in boxes)
    return ids, values


@pytest.mark.parametrize("rows,n,k", [(1, 1, 3), (3, 200, 45), (20, 70, 64), (40, 130, 32), (70, 65, 32), (130, 70, 16),
                                      (2, 70, triton_linear.CHUNK + 8), (0, 16, 16)])
def test_equals_argmax_of_linear(dtype, rows, n, k):
    x, w, b = problem(dtype, rows, n, k)
    for bias in (None, b):
        logits = torch.empty(rows, n, dtype=dtype)
        triton_linear.linear(x, w, None, 0, bias, n, logits)
        ids, values = run(x, w, bias)
        assert torch.equal(ids, logits.argmax(-1)) and torch.equal(values, logits.max(-1).values.float())


def test_p33_ties_go_to_the_first_index_and_nan_wins(dtype):
    x = torch.zeros(3, 32, dtype=dtype)
    x[1, 0] = 1
    w = torch.zeros(200, 32, dtype=dtype)
    w[[40, 90, 199], 0] = 2
    assert run(x, w)[0].tolist() == [0, 40, 0]
    assert run(-x, w)[0].tolist() == [0, 0, 0]  # minus zero equals zero
    w[[77, 120], 1] = NAN
    ids, values = run(x, w)
    assert ids.tolist() == [77, 77, 77] and values.isnan().all()


def test_all_minus_infinity_gives_index_zero_and_padding_never_wins(dtype):
    x, w = torch.ones(2, 32, dtype=dtype), torch.full((100, 32), -INF, dtype=dtype)
    w[83:] = NAN
    ids, values = run(x, w, num_valid=83)
    assert ids.tolist() == [0, 0] and values.isneginf().all()


def test_p32_padded_vocabulary_tail_never_wins(dtype):
    x, w, b = problem(dtype, 4, 100, 32)
    w[83:] = 100 * x[0]
    b[83:] = INF
    ids, _ = run(x, w, b, num_valid=83, id_offset=2**40)
    assert ((ids >= 2**40) & (ids < 2**40 + 83)).all()
    assert torch.equal(ids - 2**40, run(x, w[:83], b[:83])[0])


def test_p36_multiplier_comes_before_the_soft_cap(dtype):
    x, w, b = problem(dtype, 5, 100, 64)
    want_ids, want = torch.empty(5, dtype=torch.int64), torch.empty(5, dtype=torch.float64)
    reference.lm_head.lm_head_argmax(*doubles(x, w), None, 0, *doubles(b), 100, 100, -3.0, 5.0, 0, want_ids, want)
    ids, values = run(x, w, b, scale=-3.0, softcap=5.0)
    torch.testing.assert_close(values.double(), want, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=0)
    if dtype == torch.float32:
        assert torch.equal(ids, want_ids)


def test_combine_argmax_equals_reference():
    choices = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0])
    values = choices[torch.randint(0, 7, (5, 300))]
    ids = torch.stack([torch.randperm(5) for _ in range(300)], 1) + 2**40
    for shards in (1, 2, 5):
        got, want = ((torch.full((300,), 77), torch.full((300,), 77.0)) for _ in range(2))
        assert triton_head.combine_argmax(values[:shards], ids[:shards], *got) is None
        reference.lm_head.combine_argmax(values[:shards], ids[:shards], *want)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1].isnan(), want[1].isnan())
        assert torch.equal(got[1].nan_to_num(), want[1].nan_to_num())
    triton_head.combine_argmax(values[:, :0], ids[:, :0], torch.empty(0, dtype=torch.int64), torch.empty(0))


# ---- lm_head_topk and combine_topk
# -------------------------------------------------------------------------------------

def boxes(rows, k):
    shapes = ((rows, k), torch.int64), ((rows, k), torch.float32), ((rows,), torch.float32)
    return [torch.full((n[0] + 2, *n[1:]), 77, dtype=dtype) for n, dtype in shapes]


def inside(outputs):
    assert all((t[[0, -1]] == 77).all() for t in outputs)
    return [t[1:-1] for t in outputs]


def run_topk(x, w, wanted, bias=None, num_valid=None, scale=1.0, softcap=0.0, id_offset=0, scales=None):
    outputs, n = boxes(x.shape[0], wanted), w.shape[0]
    assert triton_topk.lm_head_topk(x, w, scales, 0, bias, n, n if num_valid is None else num_valid, scale, softcap,
                                    id_offset, *inside(outputs)) is None
    return inside(outputs)


def assert_is_first(got, logits, k):
    want = boxes(logits.shape[0], k)
    reference.lm_head._first(logits.float(), torch.arange(logits.shape[1]).expand_as(logits), *inside(want)[:2])
    assert torch.equal(got[0], want[0][1:-1])
    assert torch.equal(got[1].isnan(), want[1][1:-1].isnan())
    assert torch.equal(got[1].nan_to_num(7.0), want[1][1:-1].nan_to_num(7.0))
    assert_within_budget(got[2], logits.double().logsumexp(-1), logits.float().logsumexp(-1), ulps=2, name="lse")


def linear(x, w, bias=None, scales=None):
    logits = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    triton_linear.linear(x, w, scales, 0, bias, w.shape[0], logits)
    return logits


def same(got, want):
    return all(same_bits(a, t) for a, t in zip(got, want, strict=True))


@pytest.mark.parametrize("rows,n,k,wanted", [(1, 1, 3, 1), (3, 200, 45, 2), (1, 200, 16, 64), (20, 170, 32, 3),
                                             (40, 130, 16, 2), (66, 65, 16, 1), (0, 16, 16, 4)])
def test_topk_is_the_first_k_of_linear(dtype, rows, n, k, wanted):
    x, w, b = problem(dtype, rows, n, k)
    got = run_topk(x, w, wanted, b)
    assert_is_first(got, linear(x, w, b), wanted)
    for i in range(0, rows, 50):
        assert same(run_topk(x[i:i + 1], w, wanted, b), [t[i:i + 1] for t in got])
    if rows:
        ids, values = run(x, w, b)
        assert torch.equal(got[0][:, 0], ids) and torch.equal(got[1][:, 0], values)


def test_a_weight_in_8_bits(dtype):
    x, w, b = problem(dtype, 20, 170, 48)
    q, scales = reference.linear.quantize(w)
    logits = linear(x, q, b, scales)
    ids, values = run(x, q, b, scales=scales)
    assert torch.equal(ids, logits.argmax(-1)) and torch.equal(values, logits.max(-1).values.float())
    assert_is_first(run_topk(x, q, 3, b, scales=scales), logits, 3)


SPECIAL = [{40: NAN, 3: NAN, 399: NAN, 200: INF}, {17: INF, 390: INF, 5: -INF}, dict.fromkeys(range(398), -INF),
           dict.fromkeys(range(400), -INF), dict.fromkeys(range(64, 192), -INF), {0: -30000.0, 399: 30000.0},
           dict.fromkeys(range(0, 400, 7), 40.0)]


@pytest.mark.parametrize("special", SPECIAL, ids=range(len(SPECIAL)))
def test_p33_topk_of_ties_nan_and_infinities(dtype, special, monkeypatch):
    monkeypatch.setattr(triton_topk, "BLOCKS", 4)  # a row's blocks in several steps
    x, w, b = problem(dtype, 2, 400, 16)
    b[list(special)] = torch.tensor(list(special.values())).to(dtype)
    assert_is_first(run_topk(x, w, 5, b), linear(x, w, b), 5)


def test_p33_topk_of_equals_are_the_lowest_ids(dtype):
    x, w = torch.ones(1, 16, dtype=dtype), torch.zeros(200, 16, dtype=dtype)
    assert run_topk(x, w, 64)[0].tolist() == [list(range(64))]


def test_p32_p36_topk_of_a_capped_padded_shard(dtype):
    x, w, b = problem(dtype, 2, 100, 32)
    poisoned = b.clone()
    poisoned[83:] = NAN
    ids, *rest = run_topk(x, w, 20, poisoned, 83, -3.0, 5.0, 2**40)
    alone = run_topk(x, w[:83], 20, b[:83], None, -3.0, 5.0)
    assert same([ids - 2**40, *rest], alone)
    logits = torch.stack([run(x, w[i:i + 1], b[i:i + 1], scale=-3.0, softcap=5.0)[1] for i in range(83)], 1)
    assert_is_first(alone, logits, 20)


@pytest.mark.parametrize("shards,rows,k", [(1, 10, 3), (3, 5, 17), (2, 2, 64), (5, 40, 2), (2, 0, 4)])
def test_p33_combine_topk_equals_reference(shards, rows, k):
    choices = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1.5])
    values = choices[torch.randint(0, 8, (shards, rows, k))]
    ids = torch.stack([torch.randperm(shards * k) for _ in range(rows or 1)], 1)[:, :rows] + 2**40
    ids = ids.view(shards, k, rows).transpose(1, 2).contiguous()
    lse = torch.cat([choices, torch.tensor([700.0, -700.0])])[torch.randint(0, 10, (shards, rows))]
    got, want = boxes(rows, k), boxes(rows, k)
    assert triton_topk.combine_topk(values, ids, lse, *inside(got)) is None
    reference.lm_head.combine_topk(values, ids, lse, *inside(want))
    got, want = inside(got), inside(want)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1].isnan(), want[1].isnan())
    assert torch.equal(got[1].nan_to_num(7.0), want[1].nan_to_num(7.0))
    assert_within_budget(got[2], lse.double().logsumexp(0), want[2])
