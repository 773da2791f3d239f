"""What `pytest --fast` selects."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import BYTE_ISAS, ISAS, VECTOR_ISAS, is_fast


def item(slow=False, **params):
    return SimpleNamespace(callspec=SimpleNamespace(params=params), get_closest_marker=lambda name: slow or None)


def test_the_best_instruction_set_and_bfloat16_are_kept():
    for name, sets in (("isa", ISAS), ("byte_isa", BYTE_ISAS), ("vector_isa", VECTOR_ISAS)):
        assert [isa for isa in sets if is_fast(item(**{name: isa}))] == sets[-1:]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    assert [dtype for dtype in dtypes if is_fast(item(isa=ISAS[-1], dtype=dtype))] == [torch.bfloat16]


@pytest.mark.parametrize("one", [SimpleNamespace(get_closest_marker=lambda name: None), item(), item(dtype="fp32"),
                                 item(width=3)])
def test_what_is_not_repeated_is_kept(one):
    assert is_fast(one)


def test_what_is_slow_is_not():
    assert not is_fast(item(slow=True)) and not is_fast(item(slow=True, isa=ISAS[-1]))
