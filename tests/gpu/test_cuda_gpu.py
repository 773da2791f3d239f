"""The CUDA C++ kernels on a GPU, whichever of them _gpu.py chooses: the host's tests again, Triton's bits, a graph."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dflash_kernels import _library, _triton
from dflash_kernels.testing import same_bits
from tests.gpu.test_ops_gpu import DEVICE, moved
from tests.kernels import test_cuda_context
from tests.kernels.test_context import cache_views
from tests.kernels.test_cuda_context import (
    Case,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or _library.cuda is None,
                                reason="torch sees no GPU, or the CUDA C++ library is not built")


def by_cuda(*args):
    torch.ops.dflash_cuda.write_context_kv(*args)


def by_triton(*args):
    _triton.load("context:write_context_kv")(*args)


class OnGpu(TorchDispatchMode):
    """Answers write_context_kv of CPU tensors on the GPU, whole storages going there and back."""

    answer = staticmethod(by_cuda)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.dflash.write_context_kv.default:
            return func(*args, **(kwargs or {}))
        there = {}
        self.answer(*moved(args, lambda t: t.to(DEVICE), there))
        for cache in (*args[3], *args[4]):
            storage = cache.untyped_storage()
            torch.empty(0, dtype=cache.dtype).set_(storage).copy_(there[storage.data_ptr()])
        return None


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setattr(test_cuda_context, "OnHost", OnGpu)


@pytest.mark.parametrize("shape", [(9, 3, 3, 64, 64), (5, 2, 8, 128, 64), (5, 2, 2, 128, 128), (2, 1, 2, 256, 256),
                                   (3, 2, 2, 20, 6), (2, 1, 1, 96, 96)], ids=str)
def test_triton_writes_the_same_bits(dtype, shape, monkeypatch):
    case = Case(dtype, *shape)
    for change in (dict(v_scale=0.707), dict(interleaved=True, rounding="end"), dict(cos_sin=None)):
        ours = case.run(**change)
        with monkeypatch.context() as patch:
            patch.setattr(OnGpu, "answer", staticmethod(by_triton))
            assert same_bits(case.run(**change), ours)


def test_a_captured_launch_reads_its_inputs_anew(dtype):
    case = Case(dtype, 8, layers=2)
    base, lens = case.base().to(DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    k, v = (list(t) for t in zip(*cache_views(base, "nhd"), strict=True))
    kv, positions, slots, weights, table = (t.to(DEVICE) for t in (case.kv, case.positions, case.slots,
                                                                   *case.args.values()))
    arguments = kv, positions, slots, k, v, [], [], weights, table, lens, 1e-6, 1.0, False, True
    by_cuda(*arguments)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_cuda(*arguments)
    for commits in ([3, 1], [0, 4]):
        base.fill_(float("nan"))
        lens.copy_(torch.tensor(commits))
        slots.copy_(slots.flip(0))
        graph.replay()
        case.slots = slots.cpu()
        assert same_bits(base.cpu(), case.run(commit_lens=lens.cpu()))
