"""On the stand-in for a GPU (tools.dry_gpu.gpu) kernels are interpreted: a part of the tests is enough."""

import ctypes
import os
from types import SimpleNamespace

import pytest
import torch

from dflash_kernels import _gpu, _library
from setup import find_nvcc
from tools.dry_gpu.gpu import NAME

DRY = torch.cuda.is_available() and torch.cuda.get_device_name() == NAME
# Of the tests that take minutes there, those that are run: file, and a part of the test's name.
SHORT = {"test_rows_gpu.py": ("f16-33-45",), "test_quant_gpu.py": ("f16-100-256-q4_k", "lookups", "bad_input"),
         "test_decode_gpu.py": ("baseline_text[llama-8-f32]", "p20")}


def by_host(*args):
    """write_context_kv by the steps of the CUDA C++ kernel, on the host."""
    from tests.kernels.test_cuda_context import library, params

    library().write_context_kv(ctypes.byref(params(*args)))


if DRY and find_nvcc():  # whose headers the host's steps need
    _gpu._lib.define(str(torch.ops.dflash.write_context_kv.default._schema).removeprefix("dflash::"))
    _gpu._lib.impl("write_context_kv", by_host, "CPU")
    _library.cuda = SimpleNamespace()


def pytest_collection_modifyitems(items):
    share, of = map(int, os.environ.get("DFLASH_SHARE", "0/1").split("/"))  # bench/gpu: several processes at once
    items[:] = items[share::of]
    if not DRY:
        return
    for item in items:
        if "bf16" in item.name.split("[")[-1].rstrip("]").split("-"):
            item.add_marker(pytest.mark.skip(reason="the interpreter computes bfloat16 wrongly"))
        elif not any(part in item.name for part in SHORT.get(item.path.name, [""])):
            item.add_marker(pytest.mark.skip(reason="takes minutes in the interpreter"))
