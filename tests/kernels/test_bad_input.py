"""One argument of a valid call is replaced: the answer is right, or a clear error comes before anything is written.

DFLASH_FUZZ=N tries N random replacements of each argument's owner instead of the same few every time.
"""

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash_kernels.limits import FP8
from dflash_kernels.paged_kv import PagedKV
from tests.support.op_samples import RECORDS, SAMPLES, OnReference, tensors_in

EXAMPLES = int(os.environ.get("DFLASH_FUZZ", "0"))
DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64, torch.float32, torch.bfloat16,
          torch.float16, torch.complex64, torch.float8_e4m3fn]
THINGS = [None, -1, 0, 1, 3, 2**31, 2**64, -(2**64), 2.5, -0.5, float("nan"), float("inf"), True, "each", "x", (), [],
          (1,), (1, "x"), (2**64, 0), (-2, 3), (0, 0), [None], object(), torch.tensor(1), torch.tensor([[1.0]])]
ODD_VALUES = [-1, 10, 2**31 - 1, -(2**31)]


def spread(t):
    """t's values with a stride of 2 in the last dimension."""
    wide = t.new_zeros((*t.shape[:-1], t.shape[-1] * 2)) if t.dim() else t.new_zeros((1,))
    return wide[..., ::2].copy_(t) if t.dim() else t


def rows_apart(t):
    wide = t.new_zeros((*t.shape[:-1], t.shape[-1] + 3)) if t.dim() else t.new_zeros((1,))
    return wide[..., 1:-2].copy_(t) if t.dim() else t


def resized(t, dim, size):
    out = t.new_zeros([size if i == dim else n for i, n in enumerate(t.shape)])
    n = min(size, t.shape[dim])
    out.narrow(dim, 0, n).copy_(t.narrow(dim, 0, n))
    return out


def with_value(t, value):
    t = t.clone()
    t.view(-1)[-1:] = value
    return t


@st.composite
def tensor_changes(draw, t):
    """A function from a tensor to another one, the same each time it is called."""
    kind = draw(st.sampled_from(["dtype", "drop", "add", "resize", "swap", "spread", "rows", "expand", "meta", "value",
                                 "thing"]))
    dim = draw(st.integers(0, max(0, t.dim() - 1)))
    if kind == "dtype":
        dtype = draw(st.sampled_from(DTYPES))
        return kind, lambda x: x.to(dtype)
    if kind == "meta":
        return kind, lambda x: x.to("meta")
    if kind == "add":
        return kind, lambda x: x.unsqueeze(dim)
    if kind == "value" and t.dtype in (torch.int32, torch.int64):
        value = draw(st.sampled_from(ODD_VALUES))
        return kind, lambda x: with_value(x, value)
    if kind in ("spread", "rows"):
        return kind, spread if kind == "spread" else rows_apart
    if t.dim() and kind == "drop" and t.shape[dim]:
        return kind, lambda x: x.select(dim, 0)
    if t.dim() and kind == "resize":
        size = draw(st.sampled_from([0, 1, t.shape[dim] - 1, t.shape[dim] + 1]))
        return f"resize {dim} to {size}", lambda x: resized(x, dim, max(0, size))
    if t.dim() and kind == "swap":
        other = draw(st.integers(0, t.dim() - 1))
        return kind, lambda x: x.transpose(dim, other)
    if t.dim() and kind == "expand" and t.shape[dim]:
        return kind, lambda x: x.narrow(dim, 0, 1).expand_as(x)
    thing = draw(st.sampled_from(THINGS))
    return f"{thing!r}", lambda x: thing


@st.composite
def changes(draw, value):
    if isinstance(value, torch.Tensor):
        return draw(tensor_changes(value))
    if isinstance(value, RECORDS) and draw(st.integers(0, 9)):
        field = draw(st.sampled_from([f.name for f in dataclasses.fields(value)]))
        what, change = draw(changes(getattr(value, field)))
        if isinstance(value, PagedKV) and draw(st.booleans()):
            return f"k and v {what}", lambda x: PagedKV(change(x.k), change(x.v))
        return f"{field} {what}", lambda x: dataclasses.replace(x, **{field: change(getattr(x, field))})
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        what, change = draw(changes(value[-1]))
        return f"last {what}", lambda x: [*x[:-1], change(x[-1])]
    thing = draw(st.sampled_from(THINGS))
    return f"{thing!r}", lambda x: thing


def whole_memory(arguments):
    """The memory behind every tensor: what lies around a view belongs to someone else."""
    return [t if t._base is None else t._base for t in tensors_in(list(arguments.values())) if t.device.type == "cpu"]


def raw(t):
    return bytes(t.detach().contiguous().view(torch.uint8).numpy()) if t.numel() and t.dim() else repr(t)


def call(sample, name, change, mode=None):
    torch.manual_seed(0)
    arguments = sample.arguments()
    arguments[name] = change(arguments[name])
    before = [raw(t) for t in whole_memory(arguments)]
    error = result = None
    torch.use_deterministic_algorithms(True)  # fills what is allocated: rows that an op leaves alone compare equal
    try:
        if mode is None:
            result = sample.function(**arguments)
        else:
            with mode:
                result = sample.function(**arguments)
    except (TypeError, ValueError, NotImplementedError) as e:
        error = e
    finally:
        torch.use_deterministic_algorithms(False)
    return arguments, before, result, error


def assert_only_outputs_changed(sample, arguments, before):
    for (key, t), old in zip([(k, t) for k, v in arguments.items() for t in tensors_in(v) if t.device.type == "cpu"],
                             before, strict=True):
        base = t if t._base is None else t._base
        if key not in sample.written:
            assert raw(base) == old, f"{key} was written"
        elif t._base is not None and base.dim() and t.numel():
            border = base.clone()
            border.as_strided(t.shape, t.stride(), t.storage_offset()).zero_()
            now = torch.frombuffer(bytearray(old), dtype=base.dtype).view(base.shape).clone()
            now.as_strided(t.shape, t.stride(), t.storage_offset()).zero_()
            assert raw(border) == raw(now), f"memory around {key} was written"


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.device.type == "cpu":
            if a.dtype == FP8:  # a last bit of float32 may decide between two neighbours
                torch.testing.assert_close(a.float(), b.float(), rtol=0.13, atol=1e-2, equal_nan=True)
            else:
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2, equal_nan=True)


def check(label, name, what, change):
    sample = SAMPLES[label]
    try:
        arguments, before, result, error = call(sample, name, change)
    except (TypeError, ValueError, NotImplementedError) as e:
        assert str(e).startswith(("PagedKV: ", "PackedWeight: ", "PackedExperts: ")), f"{label}: {name} {what}: {e}"
        return
    if error is not None:
        assert str(error).startswith(sample.function.__name__ + ": "), f"{label}: {name} {what}: {error!r}"
        assert before == [raw(t) for t in whole_memory(arguments)], f"{label}: {name} {what}: written before {error!r}"
        return
    assert_only_outputs_changed(sample, arguments, before)
    again, _, expected, _ = call(sample, name, change, OnReference())
    assert_close(tensors_in(result), tensors_in(expected))
    for key in sample.written:
        if key != "workspace":
            assert_close(tensors_in(arguments[key]), tensors_in(again[key]))


@pytest.mark.parametrize("label", SAMPLES)
def test_one_wrong_argument_gives_a_right_answer_or_a_clear_error(label):
    names = list(SAMPLES[label].arguments())

    @settings(max_examples=EXAMPLES or 80, deadline=None, database=None, derandomize=not EXAMPLES,
              suppress_health_check=list(HealthCheck))
    @given(st.data())
    def try_one(data):
        name = data.draw(st.sampled_from(names))
        what, change = data.draw(changes(SAMPLES[label].arguments()[name]))
        check(label, name, what, change)

    try_one()


@pytest.mark.parametrize("label", SAMPLES)
def test_none_or_a_stranger_for_every_argument(label):
    for name in SAMPLES[label].arguments():
        for thing in THINGS:
            check(label, name, f"{thing!r}", lambda _, thing=thing: thing)


@pytest.mark.parametrize("label", SAMPLES)
def test_the_samples_themselves_are_right(label):
    sample = SAMPLES[label]
    arguments, before, result, error = call(sample, next(iter(sample.arguments())), lambda x: x)
    assert error is None
    assert_only_outputs_changed(sample, arguments, before)
    _, _, expected, _ = call(sample, next(iter(sample.arguments())), lambda x: x, OnReference())
    assert_close(tensors_in(result), tensors_in(expected))
