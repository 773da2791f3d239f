"""Targets whose layers see a window of the last tokens. What they compute is compared with transformers where the
other families are; here: no bit depends on how tokens are cut into passes, and wrong configs are named."""

import pytest
import torch

from dflash_decode.model.native import NativeTarget
from dflash_decode.model.target_config import read_target_config
from dflash_kernels.testing import same_bits
from tests.support.decode_runs import Oracle, requests, run

pytest.importorskip("transformers")
from tests.decode.test_decode_target import forward  # noqa: E402
from tests.support.decode_models import COMMON, VOCAB, make_target  # noqa: E402

F, S = "full_attention", "sliding_attention"


@pytest.mark.parametrize(("family", "widths"), [("ministral-window", range(2, 17)), ("ministral3", (5, 8))])
def test_no_width_of_a_pass_changes_a_bit_past_the_windows_edge(family, widths):
    """Blocks shorter and longer than the window of 12, most of them across its edge."""
    _, target = make_target(family, torch.bfloat16)
    ids = torch.randint(0, VOCAB, (24,), generator=torch.Generator().manual_seed(0))
    alone = forward(target, ids, (0, 3), [1] * 24)
    for width in widths:
        found = forward(target, ids, (0, 3), [width] * (24 // width) + [24 % width] * (24 % width > 0))
        assert same_bits(found[0], alone[0]) and same_bits(found[1], alone[1]), width


@pytest.mark.parametrize(("family", "block_size"), [("ministral3", 5), ("ministral3", 8), ("mistral-window", 16),
                                                     ("smollm3-window", 6)])
def test_speculative_text_is_baseline_text(family, block_size):
    _, target = make_target(family, torch.bfloat16)
    baseline = run(target, None, requests(), max_context=80)
    oracle = Oracle.knowing(target, {key: value[0] for key, value in baseline.items()}, 0.2, block_size)
    got = run(target, oracle, requests(), max_context=80)
    assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in baseline.items()}
    assert max(a for *_, acceptance in got.values() for a in acceptance) > 4


def config(**changes):
    return {**COMMON, "model_type": "qwen3", "sliding_window": 9, **changes}


@pytest.mark.parametrize(("changes", "lefts"), [
    ({}, [-1] * 4), ({"use_sliding_window": True}, [-1] * 4),  # the class's max_window_layers is 28
    ({"use_sliding_window": True, "max_window_layers": 3}, [-1, -1, -1, 8]),
    ({"use_sliding_window": True, "layer_types": [S, F, F, S]}, [8, -1, -1, 8]),
    ({"model_type": "mistral"}, [8] * 4), ({"model_type": "mistral", "sliding_window": None}, [-1] * 4),
    ({"model_type": "mistral", "layer_types": [F, S, F, F]}, [-1, 8, -1, -1]),
    ({"model_type": "cwm"}, [-1, 8, 8, 8]), ({"model_type": "llama"}, [-1] * 4),
    ({"model_type": "smollm3", "use_sliding_window": True}, [-1, -1, -1, 8]),
])
def test_the_layers_that_slide(changes, lefts):
    masks = read_target_config(config(**changes)).masks
    assert [mask.window for mask in masks] == [(left, -1) for left in lefts] and all(mask.causal for mask in masks)


@pytest.mark.parametrize(("changes", "match"), [
    ({"layer_types": [F, S, F, S]}, "use_sliding_window must be true where layer_types has sliding_attention; got no"),
    ({"use_sliding_window": True, "layer_types": [F, S, F, S], "sliding_window": None}, "sliding_window must be an in"),
    ({"model_type": "mistral", "sliding_window": -1}, "sliding_window must be an integer of at least 0; got -1"),
    ({"layer_types": [F] * 3}, "layer_types must be a list of 4 layers; got"),
])
def test_windows_that_mean_nothing_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        NativeTarget(config(**changes), {})
