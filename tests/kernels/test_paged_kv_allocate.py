"""Caches that PagedKV.allocate lays out: their shape, their strides, and what it refuses."""

import pytest
import torch

from dflash_kernels import PagedKV

HUGE = 2 << 20
GOOD = dict(layers=3, num_pages=5, page_size=4, num_kv_heads=2, head_dim=16, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_page_holds_all_layers_and_a_head_is_one_stretch(dtype):
    caches = PagedKV.allocate(**{**GOOD, "dtype": dtype})
    head, page = 4 * 16, 3 * 2 * 2 * 4 * 16
    assert {(t.dtype, t.shape, t.stride()) for c in caches for t in (c.k, c.v)} == {
        (dtype, (5, 4, 2, 16), (page, 16, head, 1))}
    assert len(caches) == 3 and caches[0].k.data_ptr() % HUGE == 0
    everything = [t for c in caches for t in (c.k, c.v)]
    for i, t in enumerate(everything):
        t.copy_(torch.full(t.shape, i))
    assert [t.float().unique().tolist() for t in everything] == [[i] for i in range(6)]


def test_no_pages():
    assert [c.num_pages for c in PagedKV.allocate(**{**GOOD, "num_pages": 0})] == [0, 0, 0]


@pytest.mark.parametrize("name,value,error,words", [
    ("layers", 0, ValueError, "layers must be at least 1; got 0"),
    ("num_pages", -1, ValueError, "num_pages must be at least 0; got -1"),
    ("page_size", 2.0, TypeError, "page_size must be an int; got 2.0"),
    ("num_kv_heads", True, TypeError, "num_kv_heads must be an int; got True"),
    ("head_dim", 0, ValueError, "head_dim must be at least 1; got 0"),
    ("dtype", "bfloat16", TypeError, "dtype must be a torch.dtype; got str"),
    ("dtype", torch.int8, TypeError, "dtype must be .*; got torch.int8"),
    ("dtype", torch.float8_e5m2, NotImplementedError, "dtype must be .*; got torch.float8_e5m2"),
    ("num_pages", 2**60, MemoryError, "so many bytes"),
])
def test_bad_input_is_named(name, value, error, words):
    with pytest.raises(error, match=words):
        PagedKV.allocate(**{**GOOD, name: value})
