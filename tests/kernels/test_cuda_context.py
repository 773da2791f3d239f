"""The arithmetic and the addressing of the CUDA C++ write_context_kv, run by the host
(tests/kernels/cuda/context_host.cpp)."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dflash_kernels.testing import LAYOUTS, same_bits
from dflash_kernels.testing.cache import rotary_table
from setup import ROOT, find_nvcc
from tests.kernels import test_context
from tests.kernels.test_context import MAX_POS, check_lengths_and_slots, rows
from tests.support import fp8_cases

needs_nvcc = pytest.mark.skipif(not find_nvcc(), reason="there is no nvcc, whose headers this needs")
pytestmark = [pytest.mark.slow, needs_nvcc]
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_LAYERS = 64


class Params(ctypes.Structure):
    """WriteContextKvParams of csrc/params/context.h."""

    _fields_ = [(name, kind) for kind, names in (
        (ctypes.c_void_p, "kv"), (ctypes.c_int64, "kv_stride"), (ctypes.c_void_p, "positions slots"),
        (ctypes.c_int64, "slots_layer_stride"), (ctypes.c_void_p, "commit_lens k_weights cos_sin"),
        (ctypes.c_int64, "max_pos rotary_dim"), (ctypes.c_bool, "is_float interleaved round_each"),
        (ctypes.c_int64, "num_pages page_size k_page k_row k_head v_page v_row v_head"), (ctypes.c_bool, "is_fp8"),
        (ctypes.c_int64, "tokens requests layers num_kv_heads head_dim"), (ctypes.c_float, "eps v_scale"),
        (ctypes.c_int32, "dtype"), (ctypes.c_void_p * MAX_LAYERS, "k_caches v_caches k_scales v_scales"),
        (ctypes.c_int64, "k_scale_head v_scale_head")) for name in names.split()]


def params(kv, positions, slots, k_caches, v_caches, k_scales, v_scales, k_weights, cos_sin, commit_lens, eps, v_scale,
           interleaved, round_each):
    """The record that csrc/bindings/context.h makes of an op's arguments."""
    address = lambda t: None if t is None else t.data_ptr()  # noqa: E731
    addresses = lambda ts: (ctypes.c_void_p * MAX_LAYERS)(*map(address, ts))  # noqa: E731
    per_head = lambda ts: int(bool(ts) and ts[0].numel() > 1)  # noqa: E731
    num_pages, page_size, heads, dim = k_caches[0].shape
    max_pos, rotary = (0, 0) if cos_sin is None else cos_sin.shape
    return Params(address(kv), kv.stride(0), address(positions), address(slots),
                  slots.stride(0) if slots.dim() == 2 else 0, address(commit_lens), address(k_weights),
                  address(cos_sin), max_pos, rotary, cos_sin is None or cos_sin.dtype == torch.float32, interleaved,
                  round_each, num_pages, page_size, *k_caches[0].stride()[:3], *v_caches[0].stride()[:3],
                  k_caches[0].dtype == torch.float8_e4m3fn, kv.shape[0],
                  0 if commit_lens is None else commit_lens.shape[0], len(k_caches), heads, dim, eps, v_scale,
                  KINDS[kv.dtype], *map(addresses, (k_caches, v_caches, k_scales, v_scales)), per_head(k_scales),
                  per_head(v_scales))


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "context_host.so")
        # The host's compiler alone, with CUDA's headers; no product and sum fused, as on the GPU.
        subprocess.run([find_nvcc(), "-x", "c++", "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-shared", "-cudart=none",
                        "-Xcompiler=-fPIC,-ffp-contract=off,-Wall,-Wextra,-Wno-maybe-uninitialized", "-o", str(path),
                        str(ROOT / "tests/kernels/cuda/context_host.cpp")], check=True)
        found = ctypes.CDLL(str(path))
    found.params_size.restype, found.write_context_kv.restype = ctypes.c_size_t, None
    assert found.params_size() == ctypes.sizeof(Params)
    return found


class OnHost(TorchDispatchMode):
    """Answers write_context_kv with the steps of the CUDA C++ kernel."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.dflash.write_context_kv.default:
            return func(*args, **(kwargs or {}))
        library().write_context_kv(ctypes.byref(params(*args)))
        return None


class Case(test_context.Case):
    def run(self, base=None, **change):
        with OnHost():
            return super().run(base, **change)


def shape_of(dtype, dim, rotary, *, kv=None, **tensors):
    """(lanes, rounds, in words) for one token of one layer with two heads."""
    kv = torch.zeros(1, 4 * dim, dtype=dtype) if kv is None else kv
    cache = [torch.zeros(1, 1, 2, dim, dtype=dtype)]
    p = params(kv, torch.zeros(1), torch.zeros(1), cache, tensors.get("v", cache), [], [], None,
               rotary_table(rotary, 2) if rotary else None, None, 0.0, 1.0, False, True)
    out = (ctypes.c_int * 3)()
    library().context_shape_of(ctypes.byref(p), out)
    return out[0], out[1], bool(out[2])


def test_the_usual_heads_are_read_in_words_and_by_few_lanes():
    assert shape_of(torch.bfloat16, 128, 128) == (8, 1, True)
    assert shape_of(torch.bfloat16, 128, 64) == (4, 1, True)  # MiniMax-M2: half of the head rotates
    assert shape_of(torch.bfloat16, 128, 0) == (8, 1, True)
    assert shape_of(torch.float16, 64, 64) == (4, 1, True)
    assert shape_of(torch.bfloat16, 96, 96) == (8, 1, True)
    assert shape_of(torch.float32, 256, 256) == (32, 1, True)
    assert shape_of(torch.float32, 512, 512) == (32, 8, False)
    assert shape_of(torch.bfloat16, 1024, 0) == (32, 16, False)
    assert shape_of(torch.bfloat16, 20, 6) == (8, 1, False)
    crooked = torch.zeros(4 * 128 + 1, dtype=torch.bfloat16)[1:].view(1, -1)
    assert not shape_of(torch.bfloat16, 128, 128, kv=crooked)[2]
    wide = torch.zeros(1, 1, 2, 132, dtype=torch.bfloat16)[..., :128]
    assert not shape_of(torch.bfloat16, 128, 128, v=[wide])[2]


@pytest.mark.parametrize("rounding", ["each", "end"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "pairs"])
@pytest.mark.parametrize("shape", [(8, 3, 3, 64, 64), (3, 8, 1, 64, 32), (5, 1, 2, 128, 64), (2, 5, 1, 256, 256),
                                   (3, 2, 2, 20, 6), (2, 1, 1, 96, 96), (1, 1, 2, 1024, 1024), (0, 2, 1, 64, 64)],
                         ids=str)
def test_matches_reference(dtype, shape, interleaved, rounding):
    case = Case(dtype, *shape)
    for table_dtype in {torch.float32, dtype}:
        case.check(interleaved=interleaved, rounding=rounding, v_scale=0.707, eps=1e-5,
                   cos_sin=case.args["cos_sin"].to(table_dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_p16_p17_p18_layouts_commit_lengths_and_slots_that_do_not_exist(dtype, layout):
    check_lengths_and_slots(Case(dtype, 12, 2, 2, 32, 32, layout, page_size=4))


def test_p14_one_copies_the_bits_of_v(dtype):
    case = Case(dtype)
    case.kv[0, -3:] = torch.tensor([-0.0, float("inf"), float("nan")]).to(dtype)
    v = case.kv.unflatten(1, (3, 2, 3, 64))[:, :, 1].transpose(0, 1)
    plain, scaled = (rows(case.run(v_scale=s), "nhd", case.slots) for s in (1.0, 0.707))
    assert same_bits(plain[:, 1], v.contiguous())
    assert same_bits(scaled[:, 1].nan_to_num(), (v.float() * 0.707).to(dtype).nan_to_num())


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "pairs"])
@pytest.mark.parametrize("rotary", [64, 32, 0])
def test_words_and_single_elements_write_the_same_bits(dtype, rotary, interleaved):
    """Whether a row happens to lie at an address that divides by 16 changes nothing."""
    case = Case(dtype, 5, rotary_dim=rotary or 64)
    if not rotary:
        case.args["cos_sin"] = None
    wide = torch.full((5, case.kv.shape[1] + 37), float("nan"), dtype=dtype)
    wide[:, 5:-32] = case.kv
    assert same_bits(case.run(kv=wide[:, 5:-32], interleaved=interleaved), case.run(interleaved=interleaved))


def test_slots_of_each_layer_no_rotation_and_no_norm(dtype):
    case = Case(dtype, 5, layers=3, page_size=4)
    slots = torch.stack([torch.randperm(24)[:7] for _ in range(3)])
    slots[1, 3] = -1
    case.check(slots=slots[:, 1:6])
    case.check(cos_sin=None)
    raw = rows(case.run(cos_sin=None, k_weights=None), "nhd", case.slots)
    assert same_bits(raw, case.kv.unflatten(1, (3, 2, 3, 64)).movedim(0, 2).contiguous())


def test_a_row_has_the_same_bits_alone_and_in_any_batch(dtype):
    case = Case(dtype, 12, layers=2)
    parts = case.base()
    for part in (slice(0, 1), slice(1, 4), slice(4, 12)):
        case.run(parts, kv=case.kv[part], positions=case.positions[part], slots=case.slots[part])
    assert same_bits(parts, case.run())


def test_planted_faults_change_k_bits(dtype):
    case = Case(dtype)
    case.positions = torch.arange(10, 18)
    good = rows(case.run(), "nhd", case.slots)
    for fault in (dict(positions=case.positions + 3), dict(interleaved=True), dict(k_weights=None),
                  dict(k_weights=case.args["k_weights"].roll(1, 0)), dict(cos_sin=rotary_table(32, MAX_POS))):
        bad = rows(case.run(**fault), "nhd", case.slots)
        assert (bad[:, 0] != good[:, 0]).any(-1).any(0).all() and same_bits(bad[:, 1], good[:, 1])


# ---- fp8 caches ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", fp8_cases.SCALES)
@pytest.mark.parametrize("shape", [(3, 2, 3, 64, 64), (2, 2, 1, 128, 64), (2, 1, 2, 20, 6), (1, 1, 1, 512, 512)],
                         ids=str)
def test_fp8_is_stored_divided_and_rounded(dtype, shape, kind):
    fp8_cases.check_stored(Case(dtype, *shape), kind, interleaved=kind == "head", v_scale=0.707)


def test_every_value_is_stored_as_the_nearest_fp8(dtype):
    fp8_cases.check_every_value(Case(dtype, 2, 1, 1, 64, page_size=8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_p16_p17_p18_fp8_layouts_commit_lengths_and_slots_that_do_not_exist(dtype, layout):
    case = Case(dtype, 12, 2, 2, 32, 32, layout, page_size=4)
    case.slots = torch.tensor([0, -1, 23, 24, 1, 2, 2**62, -(2**62), 3, 4, -24, 2]).where(
        torch.tensor(layout != "slots"), torch.tensor([0, -1, 5, 6, 1, 2, 2**62, -(2**62), 3, 4, -6, 2]))
    fp8_cases.check_stored(case, "head", commit_lens=torch.tensor([4, 1, 9], dtype=torch.int32))


def test_planted_faults_change_the_fp8_that_is_stored(dtype):
    fp8_cases.check_planted_store_faults(Case(dtype, 2, 2, 3, 64, 64))
