"""Ministral 3: queries that grow with their position. What a pass computes is compared with transformers where the
other families are; here: the factor itself, and configs that mean something else."""

import pytest
import torch

from dflash_decode.model.native import NativeTarget
from dflash_decode.model.target_config import read_target_config

pytest.importorskip("transformers")
from tests.support.decode_models import make_target  # noqa: E402

F, S = "full_attention", "sliding_attention"


@pytest.fixture(scope="module")
def config():
    return make_target("ministral3")[0].config.to_dict()


def test_the_factor_is_that_of_transformers_bit_for_bit(config):
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    c = read_target_config(config)
    keys, queries = (ropes[0].table(512).double() for ropes in (c.ropes, c.query_ropes))
    want = get_llama_4_attn_scale(torch.arange(512)[None], 0.5, 6)[0, 0].double()
    assert torch.equal(queries.float(), (keys * want).float()) and len(want.unique()) == 512 // 6 + 1


def rope(config, **changes):
    return {"rope_parameters": {**config["rope_parameters"], **changes}}


def test_what_is_missing_or_out_of_range_is_named(config):
    for changes, match in (
            (rope(config, llama_4_scaling_beta=None), "llama_4_scaling_beta must be a number at least 0; got nothing"),
            (rope(config, llama_4_scaling_beta=-0.1), "llama_4_scaling_beta must be a number at least 0; got -0.1"),
            (rope(config, llama_4_scaling_beta=3e38), "rope of type 'yarn' must give finite frequencies"),
            (rope(config, original_max_position_embeddings=0), "original_max_position_embeddings must be a number ab"),
            ({"rms_norm_eps": None}, "rms_norm_eps must be a number above 0 .*; got nothing")):
        with pytest.raises(ValueError, match=match):
            NativeTarget(config | changes, {})


def test_what_the_class_does_not_read_is_refused(config):
    """It puts the window on all layers, whatever layer_types says."""
    read_target_config(config | {"layer_types": [S] * 4})
    with pytest.raises(NotImplementedError, match="layer_types must all be sliding_attention in a ministral3 model"):
        NativeTarget(config | {"layer_types": [S, F, S, S]}, {})
    with pytest.raises(NotImplementedError, match="layer_types must all be full_attention in a ministral3 model"):
        NativeTarget(config | {"layer_types": [S] * 4, "sliding_window": None}, {})
    with pytest.raises(NotImplementedError, match="rope field 'llama_4_scaling_beta' of type 'yarn' is not supported"):
        NativeTarget(config | {"model_type": "llama", "sliding_window": None}, {})
