"""The public names that are no ops: `supports` says what a call says, sizes and empty records are what ops take."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import dflash_kernels as dk
from dflash_kernels import _library, limits
from dflash_kernels.limits import FP8
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.storage import PackedWeight
from tests.support import ROOT, annotations
from tests.support.op_samples import SAMPLES, int32

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float64, torch.float32, torch.bfloat16,
          torch.float16, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
# An op's sample in which the argument that gives the op its dtype is a tensor.
SAMPLE = {op: "verify_greedy_logits" if op == "verify_greedy" else op for op in _library.NAMES}
CACHED = ("qk_norm_rope", "write_context_kv", "block_attention")
WEIGHTED = ("linear", "lm_head_argmax", "lm_head_topk")


def arguments(op, **changes):
    return SAMPLES[SAMPLE[op]].arguments() | changes


def said(op, given):
    """The text of what the call raises; None where it answers."""
    try:
        SAMPLES[SAMPLE[op]].function(**given)
    except (TypeError, ValueError, NotImplementedError) as error:
        return str(error)
    return None


def reason(op, **facts):
    answer = dk.supports(op, **facts)
    assert bool(answer) == answer.ok == (answer.reason == "")
    return answer.reason


def with_shape(text, t):
    return f"{text} {tuple(t.shape)}"


# ---- supports ------------------------------------------------------------------------------------------------------

def test_every_op_can_be_asked_about_and_nothing_else_can():
    for op in dk.build_info()["ops"]:
        assert reason(op) == ""
    with pytest.raises(ValueError, match="supports: op must be one of add_rms_norm, .*; got 'pack_weight'"):
        dk.supports("pack_weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", _library.NAMES)
def test_a_wrong_dtype_is_refused_in_the_call_s_words(op, dtype):
    name, text = limits._OPS[op].name, reason(op, dtype=dtype)
    given = arguments(op)
    given[name] = given[name].to(dtype)
    found = said(op, given)
    if text:
        assert found == with_shape(text, given[name])
    else:  # another argument may still have the sample's dtype
        assert found is None or not found.startswith(f"{op}: {name} must be")


def cache_changes(op, cache):
    return {"caches": [cache]} if op == "write_context_kv" else {"cache": cache}


@pytest.mark.parametrize("cache_dtype", (torch.float32, torch.bfloat16, torch.float16, FP8), ids=str)
@pytest.mark.parametrize("op", CACHED)
def test_another_cache_s_dtype_is_refused_in_the_call_s_words(op, cache_dtype):
    given = arguments(op)
    old = given["caches"][0] if op == "write_context_kv" else given["cache"]
    cache = PagedKV(old.k.to(cache_dtype), old.v.to(cache_dtype))
    text, found = reason(op, dtype=torch.float32, cache_dtype=cache_dtype), said(op, given | cache_changes(op, cache))
    assert bool(text) == (cache_dtype not in (torch.float32, FP8))
    if text:
        assert found == with_shape(text, cache.k)
    else:
        assert found is None or "must be" not in found or not found.startswith(f"{op}: cache")


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in (*limits.FLOATS, FP8)], ids=str)
@pytest.mark.parametrize("op", CACHED)
def test_a_cache_that_cannot_be_is_refused_in_the_record_s_words(op, dtype):
    pages = torch.zeros(2, 4, 1, 8).to(dtype)
    with pytest.raises((TypeError, NotImplementedError)) as error:
        PagedKV(pages, pages)
    assert reason(op, cache_dtype=dtype) == str(error.value)


@pytest.mark.parametrize("op", WEIGHTED)
def test_a_packed_weight_of_another_dtype_is_refused_in_the_call_s_words(op):
    packed = dk.pack_weight(torch.randn(40, 16).bfloat16())
    text = reason(op, dtype=torch.float32, weight_dtype=torch.bfloat16)
    assert text and text == said(op, arguments(op, weight=packed))
    int8 = dk.pack_weight(*dk.quantize_weight(torch.randn(40, 16)))
    assert isinstance(int8, PackedWeight) and reason(op, dtype=torch.float32, weight_dtype=torch.int8) == ""
    assert said(op, {"x": torch.randn(3, 16), "weight": int8} | ({"k": 5} if op == "lm_head_topk" else {})) is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float64, FP8], ids=str)
def test_a_weight_that_cannot_be_packed_is_refused_whatever_the_rows_are(dtype):
    with pytest.raises(TypeError) as error:
        dk.pack_weight(torch.zeros(4, 8).to(dtype))
    for op in WEIGHTED:
        assert f"{reason(op, weight_dtype=dtype)} (4, 8)" == str(error.value)


@pytest.mark.parametrize("op", ("qk_norm_rope", "write_context_kv"))
def test_head_dims_are_refused_in_the_call_s_words(op):
    for dim in (1024, 1025):
        pages = torch.zeros(2, 4, 1, dim)
        given = {"positions": torch.zeros(1, dtype=torch.int64), "cos_sin": None,
                 "slots": torch.tensor([0])} | cache_changes(op, PagedKV(pages, pages.clone()))
        if op == "qk_norm_rope":
            given |= {"qkv": torch.zeros(1, 3 * dim), "num_heads": 1, "num_kv_heads": 1, "head_dim": dim}
        else:
            given |= {"kv": torch.zeros(1, 2 * dim)}
        assert (reason(op, head_dim=dim) or None) == said(op, given)
    assert reason(op, head_dim=1025)


def test_too_many_layers_are_refused_in_the_call_s_words():
    cache = arguments("write_context_kv")["caches"][0]
    for count in (64, 65):
        given = {"kv": torch.zeros(1, count * 16), "positions": torch.zeros(1, dtype=torch.int64), "cos_sin": None,
                 "slots": torch.tensor([-1]), "caches": [cache] * count}
        assert (reason("write_context_kv", layers=count) or None) == said("write_context_kv", given)
    assert reason("write_context_kv", layers=65)


@pytest.mark.parametrize("op", ("lm_head_topk", "combine_topk"))
def test_too_many_candidates_are_refused_in_the_call_s_words(op):
    for k in (64, 65):
        given = {"x": torch.randn(2, 16), "weight": torch.randn(80, 16), "k": k} if op == "lm_head_topk" else {
            "values": torch.zeros(2, 2, k), "ids": torch.arange(4 * k).view(2, 2, k), "lse": torch.zeros(2, 2)}
        assert (reason(op, k=k) or None) == said(op, given)
    assert reason(op, k=65)


ATTENTION = [(dtype, cached) for dtype in limits.FLOATS for cached in (dtype, FP8)]


@pytest.mark.parametrize("dtype, cached", ATTENTION, ids=str)
def test_heads_without_a_gpu_kernel_are_refused_in_the_launcher_s_words(dtype, cached):
    pytest.importorskip("triton")
    from dflash_kernels._triton import attention

    widest = 0
    for dim in (1, 20, 63, 64, 65, 128, 256, 257, 320, 1025):
        text = reason("block_attention", device="cuda", dtype=dtype, cache_dtype=cached, head_dim=dim)
        if text:
            q, kv = torch.zeros(0, 3, 2, dim, dtype=dtype), torch.zeros(0, 3, 1, dim, dtype=dtype)
            pages = torch.zeros(1, 4, 1, dim, dtype=cached)
            with pytest.raises(NotImplementedError) as error:
                attention.block_attention(q, kv, kv, pages, pages, None, None, torch.zeros(0, 1, dtype=torch.int32),
                                          int32(), None, None, None, q.shape[1], 1.0, False, -1, -1, None, 0.0, q)
            assert str(error.value) == text
        else:
            widest = dim
            for major, softcap in ((8, False), (9, True), (10, False), (12, False)):
                assert attention.config(dtype.itemsize, cached.itemsize, dim, softcap, major)
    assert widest == max(key[2] for key in attention.CONFIGS if key[:2] == (dtype.itemsize, cached.itemsize))


def test_a_gpu_s_limits_are_a_gpu_s_alone():
    wide = {"dtype": torch.bfloat16, "head_dim": 320}
    text = "block_attention: heads of more than 256 have no CUDA kernel; got 320"
    assert reason("block_attention", device="cuda", **wide) == text
    assert reason("block_attention", device=torch.device("cuda", 1), head_dim=320) == text
    assert not torch.cuda.is_initialized()
    for device in ("cpu", None, torch.device("meta")):
        assert reason("block_attention", device=device, **wide) == ""
    assert said("block_attention", {"q": torch.randn(1, 2, 2, 320), "k": torch.randn(1, 2, 1, 320),
                                    "v": torch.randn(1, 2, 1, 320), "cache": None, "page_table": None,
                                    "context_lens": int32(0)}) is None


@pytest.mark.parametrize("error, facts, text", [
    (TypeError, {"layers": 3}, "supports: facts of linear must be among device, dtype, weight_dtype, "
     "weight_format; got layers"),
    (TypeError, {"dtype": "bfloat16"}, "supports: dtype must be a torch.dtype; got 'bfloat16'"),
    (TypeError, {"device": 0}, "supports: device must be a str or torch.device; got 0"),
    (ValueError, {"device": "gpu"}, "supports: device must be one that torch knows; got 'gpu'")])
def test_a_question_that_makes_no_sense_is_an_error(error, facts, text):
    with pytest.raises(error, match=re.escape(text)):
        dk.supports("linear", **facts)


@pytest.mark.parametrize("error, size", [(TypeError, True), (TypeError, 2.0), (ValueError, 0)])
def test_a_size_that_is_none_is_an_error(error, size):
    with pytest.raises(error, match="supports: head_dim must be (an int|at least 1); got"):
        dk.supports("block_attention", head_dim=size)


def test_no_limit_is_raised_elsewhere():
    """A NotImplementedError of an op is one of limits.py, which `supports` tells too."""
    raised = re.compile(r"^ +raise (NotImplementedError|error)\b", re.M)
    found = {file.name for file in Path(dk.__file__).parent.rglob("*.py")
             if raised.search(file.read_text(encoding="utf-8"))}
    assert found == {"limits.py"}


# ---- sizes and records ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("b, q, vocab", [(1, 1, 1), (2, 3, 10), (3, 2, 1024), (1, 4, 1025)])
def test_verify_sample_takes_a_workspace_of_that_size_and_none_smaller(b, q, vocab):
    size = dk.workspace_size(b, q, vocab)
    given = {"draft_ids": torch.zeros(b, q, dtype=torch.int64), "logits": torch.randn(b, q, vocab),
             "context_lens": torch.zeros(b, dtype=torch.int32),
             "params": dk.SamplingTensors(torch.ones(b), torch.arange(b))}
    boxed = torch.full((size + 2,), 77.0)
    dk.verify_sample(**given, workspace=boxed[1:-1])
    assert boxed[0] == 77 and boxed[-1] == 77
    with pytest.raises(ValueError, match=f"workspace must have at least {size} elements"):
        dk.verify_sample(**given, workspace=boxed[:size - 1])


@pytest.mark.parametrize("error, sizes, text", [
    (ValueError, (-1, 8, 100), "workspace_size: requests must be at least 0; got -1"),
    (ValueError, (1, 0, 100), "workspace_size: block must be at least 1; got 0"),
    (TypeError, (1, 8, 100.0), "workspace_size: vocab must be an int; got float")])
def test_a_workspace_of_no_size_is_an_error(error, sizes, text):
    with pytest.raises(error, match=re.escape(text)):
        dk.workspace_size(*sizes)


def same_memory(ours, theirs):
    """Shapes, dtypes and devices, field by field."""
    for field in fields(theirs):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None:
            assert (a.shape, a.dtype, a.device, a.is_contiguous()) == (b.shape, b.dtype, b.device, True), field.name


@pytest.mark.parametrize("b, q", [(0, 1), (1, 1), (3, 5)])
def test_an_empty_verified_is_what_both_verifications_allocate(b, q):
    out, ids, lens = dk.Verified.empty(b, q), torch.zeros(b, q, dtype=torch.int64), torch.zeros(b, dtype=torch.int32)
    same_memory(out, dk.verify_greedy(ids, ids, lens))
    assert dk.verify_greedy(ids, ids, lens, out=out) is out
    assert out.tokens.tolist() == [[0] * q] * b and out.commit_lens.tolist() == [q] * b
    sampled = dk.verify_sample(ids, torch.zeros(b, q, 7), lens, dk.SamplingTensors(torch.zeros(b), ids[:, 0].clone()))
    same_memory(out, sampled)
    same_memory(dk.Verified.empty(b, q, device="meta"), dk.verify_greedy(*(t.to("meta") for t in (ids, ids, lens))))


@pytest.mark.parametrize("slots, hidden, dtype", [(True, 0, torch.float32), (False, 0, torch.float32),
                                                  (True, 6, torch.float16), (False, 6, torch.bfloat16)])
@pytest.mark.parametrize("b, q", [(0, 1), (2, 3)])
def test_an_empty_block_is_what_prepare_block_allocates(b, q, slots, hidden, dtype):
    given = {"anchor_ids": torch.zeros(b, dtype=torch.int64), "context_lens": torch.zeros(b, dtype=torch.int32),
             "block_size": q, "mask_token_id": 1, "page_table": torch.zeros(b, 2, dtype=torch.int32) if slots else None,
             "page_size": 4 if slots else None, "embedding": torch.ones(3, hidden, dtype=dtype) if hidden else None}
    out = dk.PreparedBlock.empty(b, q, slots=slots, hidden=hidden, dtype=dtype)
    same_memory(out, dk.prepare_block(**given))
    assert dk.prepare_block(**given, out=out) is out and out.ids.tolist() == [[0] + [1] * (q - 1)] * b


@pytest.mark.parametrize("record", (dk.Verified, dk.PreparedBlock))
def test_a_record_of_no_size_is_an_error(record):
    name = f"{record.__name__}.empty"
    with pytest.raises(TypeError, match=f"{name}: requests must be an int; got 2.0"):
        record.empty(2.0, 3)
    with pytest.raises(ValueError, match=f"{name}: block must be at least 1; got 0"):
        record.empty(2, 0)
    with pytest.raises(ValueError, match=f"{name}: requests must be at least 0; got -1"):
        record.empty(-1, 3)


# ---- names ---------------------------------------------------------------------------------------------------------

def test_what_is_imported_for_users_is_in_all_and_nothing_else_is():
    visible = {name for name, value in vars(dk).items()
               if not name.startswith("_") and not inspect.ismodule(value)}
    assert visible == set(dk.__all__) and len(dk.__all__) == len(visible)


@pytest.mark.parametrize("name", dk.__all__)
def test_public_names_have_their_types(name):
    assert list(annotations.functions_of(name, getattr(dk, name)))
    assert annotations.missing(name, getattr(dk, name)) == []


def test_a_missing_type_is_seen():
    class Thing:
        def __init__(self, size): ...

        def told(self, of: int): ...

        @property
        def bare(self): ...

        def whole(self, of: int) -> int: ...

    Thing.__module__ = "dflash_kernels.types"
    assert annotations.missing("Thing", Thing) == ["Thing.__init__: size", "Thing.told: return", "Thing.bare: return"]


def test_the_wheel_says_that_the_packages_have_types(tmp_path):
    """setuptools copies what a wheel has into a folder."""
    ran = subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    typed = {file.parent.name for file in tmp_path.glob("*/py.typed")}
    assert typed == {"dflash_kernels", "dflash_decode", "dflash_engines", "dflash_bench", "dflash_serve"}


@pytest.mark.skipif(not dk.StepGraph.available(), reason="the C++ library is not built")
def test_a_graph_is_true_before_it_is_captured():
    graph = dk.StepGraph()
    assert len(graph) == 0 and graph
