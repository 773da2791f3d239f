import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import dflash_kernels as dk
from dflash_kernels import _memory, reference
from dflash_kernels.testing import assert_within_budget, doubles, same_bits

SHAPES = [(1, 1, 1), (1, 16, 32), (3, 17, 33), (8, 100, 64), (16, 64, 96), (17, 130, 40), (70, 48, 33), (0, 32, 32)]


def problem(dtype, rows, n, k, bias=True):
    x, w = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    return x, w, torch.randn(n).to(dtype) if bias else None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [True, False])
def test_linear_matches_reference(isa, dtype, shape, packed):
    x, w, b = problem(dtype, *shape)
    want = torch.empty(shape[0], shape[1], dtype=torch.float64)
    reference.linear.linear(*doubles(x, w), None, 0, *doubles(b), shape[1], want)
    got = dk.linear(x, dk.pack_weight(w) if packed else w, b)
    assert_within_budget(got, want, F.linear(x, w, b) if shape[0] else None, ulps=2)


def test_packing_is_lossless(dtype):
    w = torch.randn(45, 70).to(dtype)
    assert same_bits(reference.linear.unpack(dk.pack_weight(w).data, 45, 70), w)


def test_rows_of_a_packed_weight(dtype):
    w = torch.randn(45, 70).to(dtype)
    index = torch.tensor([44, 0, 15, 16, 16, 31])
    assert same_bits(dk.pack_weight(w).rows(index), w[index])


@pytest.mark.parametrize("kind", ["elements", "int8", "blocks"])
def test_rows_of_a_packed_weight_by_any_index(kind):
    w = torch.arange(20.0)[:, None].expand(20, 32).contiguous()
    packed = {"elements": lambda: dk.pack_weight(w), "int8": lambda: dk.pack_weight(*dk.quantize_weight(w)),
              "blocks": lambda: dk.pack_weight(dk.quantize_blocks(w, "q8_0"), format="q8_0")}[kind]()
    assert packed.rows(torch.tensor([3, 9, 5, 9, 7, 9])[::2])[:, 0].round().tolist() == [3, 5, 7]
    assert packed.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 32)
    with pytest.raises(TypeError, match=r"PackedWeight\.rows: index must be int64 \(n,\); got torch.int32"):
        packed.rows(torch.tensor([3, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"PackedWeight\.rows: index must have shape \(n,\); got \(1, 2\)"):
        packed.rows(torch.tensor([[3, 0]]))
    for wrong in ([0, 20], [-1, 3]):
        with pytest.raises(IndexError, match=r"index must be rows in \[0, 20\); got "):
            packed.rows(torch.tensor(wrong))


def test_on_cuda_a_packed_weight_is_the_weight_itself(dtype):
    with FakeTensorMode():
        w = torch.empty(45, 70, dtype=dtype, device="cuda")
        assert dk.pack_weight(w).data is w
        assert dk.linear(torch.empty(3, 70, dtype=dtype, device="cuda"), dk.pack_weight(w)).shape == (3, 45)


def test_packing_does_not_follow_the_default_device(monkeypatch):
    monkeypatch.setattr(_memory, "_block", None)
    w = torch.randn(45, 70)
    with torch.device("meta"):
        assert same_bits(dk.pack_weight(w).rows(torch.arange(45, device="cpu")), w)
    assert same_bits(dk.pack_weight(w).rows(torch.arange(45)), w)


def test_what_is_packed_does_not_keep_a_parameter_alive():
    weight = torch.nn.Parameter(torch.randn(45, 70))
    assert not dk.quantize_weight(weight)[1].requires_grad
    gone, packed = weakref.ref(weight), [dk.pack_weight(weight), dk.pack_weight(*dk.quantize_weight(weight))]
    del weight
    assert gone() is None and not any(p.data.requires_grad for p in packed) and not packed[1].scales.requires_grad


def test_packed_weights_share_memory_without_overlap():
    weights = [torch.randn(n, 64) for n in (16, 40, 300_000, 16, 100)]
    packed = [dk.pack_weight(w) for w in weights]
    spans = sorted((p.data.data_ptr(), p.data.data_ptr() + p.data.nbytes) for p in packed)
    assert all(a_end <= b for (_, a_end), (b, _) in zip(spans, spans[1:], strict=False))
    assert all(start % 64 == 0 for start, _ in spans)
    for p, w in zip(packed, weights, strict=True):
        assert same_bits(reference.linear.unpack(p.data, *w.shape), w)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_of_a_packed_weight_has_its_own_bytes_alone(copied):
    x, w = torch.randn(3, 64), torch.nn.Parameter(torch.randn(40, 64))
    for packed in (dk.pack_weight(w), dk.pack_weight(*dk.quantize_weight(w))):
        found = copied(packed)
        assert found.data.untyped_storage().nbytes() == packed.data.nbytes
        assert same_bits(dk.linear(x, found), dk.linear(x, packed))


@pytest.mark.parametrize("n,k", [(96, 64), (80, 45)])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(isa, dtype, n, k):
    x, w, b = problem(dtype, 70, n, k)
    packed = dk.pack_weight(w)
    whole = dk.linear(x, packed, b)
    for start, width in [(0, 1), (69, 1), (13, 3), (8, 8), (31, 16), (5, 33)]:
        assert same_bits(dk.linear(x[start:start + width], packed, b), whole[start:start + width])
    assert same_bits(dk.linear(x, w, b), whole), "packed and plain weights must agree bit for bit"
    shuffled = torch.randperm(70)
    assert same_bits(dk.linear(x[shuffled], packed, b), whole[shuffled])


@pytest.mark.parametrize("k", [96, 601])
def test_a_row_has_the_same_bits_in_every_number_of_rows(isa, dtype, k):
    """Of which each is cut into other groups; the longer K is walked in pieces when there are several."""
    x, w, _ = problem(dtype, 70, 112, k)
    for packed in (dk.pack_weight(w), dk.pack_weight(*dk.quantize_weight(w))):
        whole, (ids, top, lse) = dk.linear(x, packed), dk.lm_head_topk(x, packed, 1)
        for rows in (*range(1, 34), 48, 64, 65):
            at = slice(70 - rows, 70)
            assert same_bits(dk.linear(x[at], packed), whole[at]), rows
            best, values = dk.lm_head_argmax(x[at], packed)
            assert torch.equal(best, ids[at, 0]) and same_bits(values, top[at, 0]), rows
            assert same_bits(dk.lm_head_topk(x[at], packed, 1)[2], lse[at]), rows


def test_bits_do_not_depend_on_threads(isa, dtype, by_threads):
    x, w, _ = problem(dtype, 5, 600, 256)
    packed = dk.pack_weight(w)
    got = by_threads(lambda: dk.linear(x, packed))
    assert same_bits(got[0], got[1]) and same_bits(got[0], got[2])


def test_strided_rows_and_untouched_neighbours(isa, dtype):
    x, w, b = problem(dtype, 6, 40, 64)
    wide_x = torch.full((6, 200), float("nan")).to(dtype)
    wide_x[:, 70:134] = x
    out = torch.full((6, 100), 7.0).to(dtype)
    dk.linear(wide_x[:, 70:134], dk.pack_weight(w), b, out=out[:, 30:70])
    assert same_bits(out[:, 30:70].contiguous(), dk.linear(x, w, b))
    assert (out[:, :30] == 7).all() and (out[:, 70:] == 7).all()


def test_nan_stays_in_its_row(isa, dtype):
    x, w, _ = problem(dtype, 4, 32, 64)
    clean = dk.linear(x, w)
    x[2, 5] = float("nan")
    got = dk.linear(x, dk.pack_weight(w))
    assert got[2].isnan().all() and same_bits(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("rows", [1, 8, 16, 65])
@pytest.mark.parametrize("vocab", [16, 1000])
def test_lm_head_argmax_equals_argmax_of_linear(isa, dtype, rows, vocab):
    x, w, b = problem(dtype, rows, vocab, 64)
    for bias in (None, b):
        logits = dk.linear(x, w, bias)
        ids, values = dk.lm_head_argmax(x, dk.pack_weight(w), bias=bias)
        assert torch.equal(ids, logits.argmax(-1))
        assert torch.equal(values, logits.max(-1).values.float())


def test_p33_ties_go_to_the_first_index_and_nan_wins(isa, dtype):
    x = torch.zeros(3, 32, dtype=dtype)
    x[1, 0] = 1
    w = torch.zeros(200, 32, dtype=dtype)
    w[[40, 90, 199], 0] = 2
    assert dk.lm_head_argmax(x, w)[0].tolist() == [0, 40, 0]
    w[120, 1] = float("nan")
    w[77, 1] = float("nan")
    ids, values = dk.lm_head_argmax(x, w)
    assert ids.tolist() == [77, 77, 77] and values.isnan().all()


def test_all_minus_infinity_gives_index_zero(isa):
    x, w = torch.ones(2, 32), torch.full((100, 32), float("-inf"))
    ids, values = dk.lm_head_argmax(x, w)
    assert ids.tolist() == [0, 0] and values.isneginf().all()


def test_p32_padded_vocabulary_tail_never_wins(isa, dtype):
    x, w, _ = problem(dtype, 4, 100, 32)
    w[83:] = 100 * x[0]
    ids, _ = dk.lm_head_argmax(x, w, num_valid=83)
    assert (ids < 83).all() and torch.equal(ids, dk.linear(x, w)[:, :83].argmax(-1))


def test_p36_multiplier_comes_before_the_soft_cap(isa, dtype):
    x, w, _ = problem(dtype, 5, 300, 64)
    want_ids, want = torch.empty(5, dtype=torch.int64), torch.empty(5, dtype=torch.float64)
    reference.lm_head.lm_head_argmax(*doubles(x, w), None, 0, None, 300, 300, -3.0, 5.0, 0, want_ids, want)
    ids, values = dk.lm_head_argmax(x, w, scale=-3.0, softcap=5.0)
    tolerance = {torch.bfloat16: 2 ** -7, torch.float16: 2e-3, torch.float32: 2e-6}
    assert torch.allclose(values.double(), want, rtol=tolerance[dtype], atol=0)
    if dtype == torch.float32:
        assert torch.equal(ids, want_ids)


def test_shards_with_an_offset_agree_with_the_whole(isa, dtype):
    x, w, _ = problem(dtype, 6, 128, 64)
    ids, values = dk.lm_head_argmax(x, w)
    parts = [dk.lm_head_argmax(x, w[i:i + 32], id_offset=i) for i in range(0, 128, 32)]
    best = torch.stack([v for _, v in parts]).argmax(0)
    assert torch.equal(torch.stack([i for i, _ in parts]).gather(0, best[None])[0], ids)
    assert torch.equal(torch.stack([v for _, v in parts]).max(0).values, values)


def test_combine_argmax_of_shards_equals_the_whole(isa, dtype):
    x, w, _ = problem(dtype, 6, 128, 64)
    w[70] = w[20] = 8 * x[0]
    whole = dk.lm_head_argmax(x, w)
    order = torch.randperm(4)
    parts = [dk.lm_head_argmax(x, w[i:i + 32], id_offset=i) for i in (32 * order).tolist()]
    got = dk.combine_argmax(torch.stack([v for _, v in parts]), torch.stack([i for i, _ in parts]))
    assert whole[0][0] == 20 and torch.equal(got[0], whole[0]) and torch.equal(got[1], whole[1])


def test_p33_combine_argmax_takes_nan_first_and_the_lowest_id_of_equals(isa):
    nan, inf = float("nan"), float("inf")
    columns = [  # (values, ids) of three shards, and the winner
        ([1.0, 2.0, 2.0], [0, 9, 4], 4), ([nan, inf, 1.0], [7, 1, 2], 7), ([1.0, nan, nan], [0, 6, 5], 5),
        ([-inf, -inf, -inf], [3, 2, 1], 1), ([0.0, -0.0, -1.0], [8, 2, 1], 2), ([5.0, 4.0, 3.0], [2**40, 1, 0], 2**40),
        ([inf, inf, nan], [1, 0, 2**62], 2**62)]
    values = torch.tensor([v for v, _, _ in columns]).T.contiguous()
    ids = torch.tensor([i for _, i, _ in columns]).T.contiguous()
    got_ids, got_values = dk.combine_argmax(values, ids)
    assert got_ids.tolist() == [winner for _, _, winner in columns]
    won = values.gather(0, (ids == got_ids).int().argmax(0, keepdim=True))[0]
    assert torch.equal(got_values.isnan(), won.isnan()) and torch.equal(got_values.nan_to_num(), won.nan_to_num())
    assert dk.combine_argmax(values[:1], ids[:1])[0].tolist() == ids[0].tolist()
    assert dk.combine_argmax(values[:, :0], ids[:, :0])[0].shape == (0,)


def test_opcheck():
    x, w, b = problem(torch.float32, 3, 40, 32)
    torch.library.opcheck(torch.ops.dflash.linear.default, (x, w, None, 0, b, 40, torch.empty(3, 40)))
    out = (torch.empty(3, dtype=torch.int64), torch.empty(3))
    torch.library.opcheck(torch.ops.dflash.lm_head_argmax.default, (x, w, None, 0, b, 40, 40, 1.0, 0.0, 0, *out))


def test_bad_input_names_what_was_expected_and_got():
    x, w, b = problem(torch.float32, 2, 48, 32)
    with pytest.raises(TypeError, match=r"linear: weight must be float32 \(N, K\); got bfloat16 \(48, 32\)"):
        dk.linear(x, w.bfloat16())
    with pytest.raises(TypeError, match="linear: weight must be torch.float32, as x is; got packed torch.bfloat16"):
        dk.linear(x, dk.pack_weight(w.bfloat16()))
    with pytest.raises(ValueError, match=r"linear: x must have 32 = weight's K columns; got float32 \(2, 31\)"):
        dk.linear(x[:, :31], dk.pack_weight(w))
    square = torch.randn(48, 48)
    with pytest.raises(ValueError, match="linear: out must not be x; got the same tensor"):
        dk.linear(square, square.clone(), out=square)
    with pytest.raises(ValueError, match=r"linear: bias must have shape \(N,\) = \(48\)"):
        dk.linear(x, w, b[:4])
    with pytest.raises(ValueError, match="num_valid must be between 1 and 48; got 49"):
        dk.lm_head_argmax(x, w, num_valid=49)
    with pytest.raises(TypeError, match="out_ids must be int64"):
        dk.lm_head_argmax(x, w, out_ids=torch.empty(2, dtype=torch.int32))
