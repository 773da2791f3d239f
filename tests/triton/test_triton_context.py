import pytest
import torch
import triton
import triton.language as tl

from dflash_kernels._triton._fp8 import of_fp8
from dflash_kernels._triton.context import base_addresses, write_context_kv
from dflash_kernels._triton.rope import qk_norm_rope
from dflash_kernels.limits import FP8
from dflash_kernels.testing import LAYOUTS, cache_views, same_bits
from dflash_kernels.testing.cache import rotary_table
from tests.kernels import test_context, test_cuda_context
from tests.kernels.test_context import MAX_POS, NUM_PAGES, check_lengths_and_slots, rows
from tests.support import fp8_cases


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


class Case(test_context.Case):
    def run(self, base=None, **change):
        base = self.base() if base is None else base
        k, v = (list(t) for t in zip(*cache_views(base, self.shape[0]), strict=True))
        a = dict(kv=self.kv, positions=self.positions, slots=self.slots, eps=1e-6, interleaved=False, commit_lens=None,
                 v_scale=1.0, rounding="each", **self.args) | change
        scales = ([s for s in each if s is not None] for each in (self.k_scales, self.v_scales))
        assert write_context_kv(a["kv"], a["positions"], a["slots"], k, v, *scales, a["k_weights"], a["cos_sin"],
                                a["commit_lens"], a["eps"], a["v_scale"], a["interleaved"],
                                a["rounding"] == "each") is None
        return base


@pytest.mark.parametrize("shape", [(3, 3, 3, 64, 64), (2, 8, 1, 64, 32), (2, 1, 2, 128, 64), (1, 2, 1, 256, 256),
                                   (2, 2, 2, 20, 6), (0, 2, 1, 64, 64), (1, 1, 9, 128, 128)], ids=str)
def test_matches_reference(dtype, shape):
    case = Case(dtype, *shape)
    for interleaved, rounding in ((False, "each"), (True, "end")):
        case.check(interleaved=interleaved, rounding=rounding, v_scale=0.707, eps=1e-5)
    case.check(cos_sin=case.args["cos_sin"].to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_p16_p17_p18_layouts_commit_lengths_and_slots_that_do_not_exist(dtype, layout):
    check_lengths_and_slots(Case(dtype, 12, 2, 2, 32, 32, layout, page_size=4))


def test_p14_one_copies_the_bits_of_v(dtype):
    case = Case(dtype, 2)
    case.kv[0, -3:] = torch.tensor([-0.0, float("inf"), float("nan")]).to(dtype)
    v = case.kv.unflatten(1, (3, 2, 3, 64))[:, :, 1].transpose(0, 1)
    assert same_bits(rows(case.run(), "nhd", case.slots)[:, 1], v.contiguous())


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "pairs"])
def test_k_has_the_bits_of_qk_norm_rope(dtype, interleaved):
    layers, heads, dim = 2, 2, 64
    case = Case(dtype, 3, layers, heads, dim, 32)
    got = rows(case.run(interleaved=interleaved), "nhd", case.slots)
    for layer, kv in enumerate(case.kv.unflatten(1, (layers, -1)).unbind(1)):
        qkv = torch.cat([torch.randn(3, 3 * dim).to(dtype), kv], 1)
        qk_norm_rope(qkv, case.positions, case.args["cos_sin"], None, case.args["k_weights"][layer], *[None] * 5,
                     3, heads, dim, 1e-6, interleaved, True)
        assert same_bits(got[layer, 0], qkv.unflatten(1, (-1, dim))[:, 3:5].contiguous())


def test_slots_of_each_layer_strided_rows_and_no_rotation(dtype):
    case = Case(dtype, 3, layers=2, page_size=4)
    slots = torch.stack([torch.randperm(24)[:7] for _ in range(2)])
    slots[1, 3] = -1
    case.check(slots=slots[:, 1:4], cos_sin=None)
    wide = torch.full((3, case.kv.shape[1] + 37), float("nan"), dtype=dtype)
    wide[:, 5:-32] = case.kv
    assert same_bits(case.run(kv=wide[:, 5:-32]), case.run())


def test_planted_faults_change_k_bits(dtype):
    case = Case(dtype, 2)
    case.positions = torch.arange(10, 12)
    good = rows(case.run(), "nhd", case.slots)
    for fault in (dict(positions=case.positions + 3), dict(k_weights=case.args["k_weights"].roll(1, 0)),
                  dict(cos_sin=rotary_table(32, MAX_POS))):
        bad = rows(case.run(**fault), "nhd", case.slots)
        assert (bad[:, 0] != good[:, 0]).any(-1).any(0).all() and same_bits(bad[:, 1], good[:, 1])


def test_the_table_of_addresses_is_made_once_for_each_set_of_caches():
    k, v = ([torch.zeros(2, 2, 1, 8) for _ in range(3)] for _ in range(2))
    table, aligned = base_addresses(k, v)
    assert table.tolist() == [t.data_ptr() for t in (*k, *v)] and aligned
    assert base_addresses(k, v)[0] is table and base_addresses(k[::-1], v)[0] is not table
    assert not base_addresses([t[..., 1:] for t in k], v)[1]


# ---- fp8 caches ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", fp8_cases.SCALES)
@pytest.mark.parametrize("shape", [(3, 2, 3, 64, 64), (2, 2, 1, 128, 64), (2, 1, 2, 20, 6), (0, 1, 1, 64, 64)], ids=str)
def test_fp8_is_stored_divided_and_rounded(dtype, shape, kind):
    fp8_cases.check_stored(Case(dtype, *shape), kind, interleaved=kind == "head", v_scale=0.707)


def test_every_value_is_stored_as_the_nearest_fp8(dtype):
    fp8_cases.check_every_value(Case(dtype, 2, 1, 1, 64, page_size=8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_p16_p17_p18_fp8_layouts_commit_lengths_and_slots_that_do_not_exist(dtype, layout):
    case = Case(dtype, 12, 2, 2, 32, 32, layout, page_size=4)
    end = NUM_PAGES * case.page_size
    case.slots = torch.tensor([0, -1, end - 1, end, 1, 2, 2**62, -(2**62), 3, 4, -end, 2])
    fp8_cases.check_stored(case, "head", commit_lens=torch.tensor([4, 1, 9], dtype=torch.int32))


def test_planted_faults_change_the_fp8_that_is_stored(dtype):
    fp8_cases.check_planted_store_faults(Case(dtype, 2, 2, 3, 64, 64))


def test_every_fp8_code_is_read_as_its_number(dtype):
    codes, found = torch.arange(256, dtype=torch.uint8), torch.empty(256, dtype=dtype)
    read_codes[1,](codes, found)
    want = codes.view(FP8).to(dtype)
    assert torch.equal(found.isnan(), want.isnan()) and torch.equal(found.nan_to_num(), want.nan_to_num())
    assert torch.equal(found.signbit()[:255], want.signbit()[:255])


@triton.jit
def read_codes(codes, found):
    i = tl.arange(0, 256)
    tl.store(found + i, of_fp8(tl.load(codes + i), found.dtype.element_ty, False))


# ---- both roads ----------------------------------------------------------------------------------------------------

@test_cuda_context.needs_nvcc
@pytest.mark.parametrize("shape", [(3, 2, 2, 64, 64), (2, 1, 2, 64, 32), (2, 1, 1, 20, 6), (1, 1, 1, 96, 96)], ids=str)
def test_cuda_cpp_writes_the_same_bits(dtype, shape):
    """So that a key does not depend on which of the two is faster on a machine."""
    case, other = Case(dtype, *shape), test_cuda_context.Case(dtype, *shape)
    other.kv, other.positions, other.slots, other.args = case.kv, case.positions, case.slots, case.args
    for change in (dict(interleaved=False, rounding="each"), dict(interleaved=True, rounding="end"),
                   dict(cos_sin=None)):
        assert same_bits(case.run(v_scale=0.707, **change), other.run(v_scale=0.707, **change))
    other.cache_dtype, other.k_scales, other.v_scales = (fp8_cases.make_fp8(case, "head").cache_dtype, case.k_scales,
                                                         case.v_scales)
    assert same_bits(case.run(), other.run())
