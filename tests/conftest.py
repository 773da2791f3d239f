import pytest
import torch

from dflash_kernels.testing import every_isa, use_isa


@pytest.fixture(params=every_isa())
def isa(request):
    """Runs the test once per instruction set of this machine."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
