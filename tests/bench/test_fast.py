"""What `pytest --fast` selects."""

from types import SimpleNamespace

import pytest
import torch

from dflash_kernels.testing import every_isa
from tests.conftest import is_fast


def item(slow=False, **params):
    return SimpleNamespace(callspec=SimpleNamespace(params=params), get_closest_marker=lambda name: slow or None)


def test_the_best_instruction_set_and_bfloat16_are_kept():
    assert [isa for isa in every_isa() if is_fast(item(isa=isa))] == every_isa()[-1:]
    assert [isa for isa in every_isa()[:3] if is_fast(item(vector_isa=isa))] == every_isa()[:3][-1:]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    assert [dtype for dtype in dtypes if is_fast(item(isa=every_isa()[-1], dtype=dtype))] == [torch.bfloat16]


@pytest.mark.parametrize("one", [SimpleNamespace(get_closest_marker=lambda name: None), item(), item(dtype="fp32"),
                                 item(width=3)])
def test_what_is_not_repeated_is_kept(one):
    assert is_fast(one)


def test_what_is_slow_is_not():
    assert not is_fast(item(slow=True)) and not is_fast(item(slow=True, isa=every_isa()[-1]))
