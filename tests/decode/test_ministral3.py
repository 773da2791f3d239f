"""Ministral 3: queries that grow with their position, within a multimodal checkpoint. What a pass computes is compared
with transformers where the other families are; here: the factor itself, the published form, and configs that mean
something else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_decode.checkpoint import CheckpointError
from dflash_decode.model.native import NativeTarget
from dflash_decode.model.target_config import read_target_config
from dflash_decode.session import Session
from tests.support import tiny

transformers = pytest.importorskip("transformers")
from tests.support.decode_models import COMMON, FAMILIES, baseline_text, make_target, randomise  # noqa: E402

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


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def published(request, tmp_path_factory):
    """A multimodal model, its directory with the names that Mistral publishes, and the tensors."""
    folder = tiny.write_target(tmp_path_factory.mktemp("m") / "m")
    text = transformers.Ministral3Config(**{**COMMON, **FAMILIES["ministral3"][1], "vocab_size": tiny.VOCAB,
                                            "tie_word_embeddings": request.param})
    seen = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "head_dim": 16, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = transformers.Mistral3ForConditionalGeneration(transformers.Mistral3Config(
        text_config=text, vision_config=transformers.PixtralVisionConfig(**seen),
        tie_word_embeddings=request.param)).eval()
    randomise(model)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.layers.3.") for name in tensors)
    assert any("vision_tower" in name for name in tensors)
    assert ("language_model.lm_head.weight" in tensors) != request.param
    return model, folder, tensors


def test_the_text_of_a_published_checkpoint_is_that_of_transformers(published):
    model, folder, _ = published
    session, prompt = Session.load(folder, "random", dtype="float32", native=True, block_size=4), list(range(1, 30))
    assert isinstance(session.target, NativeTarget)
    assert session.run([prompt], max_tokens=12).answers[0].tokens == baseline_text(model, prompt, 12)


def test_weights_in_8_bits_have_one_scale_and_rows_are_not_rounded(published, tmp_path):
    """Ministral 3's form."""
    _, folder, tensors = published
    stored, exact = {}, {}
    for name, t in tensors.items():
        stored[name] = exact[name] = t
        if name.startswith("language_model.model.layers.") and t.dim() == 2:
            scale = torch.tensor(0.25)
            stored |= {name: (4 * t).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale,
                       f"{name.removesuffix('.weight')}.activation_scale": scale.clone()}
            exact[name] = stored[name].float() / 4
    config = json.loads((folder / "config.json").read_text())
    eight = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
             "modules_to_not_convert": ["vision_tower", "lm_head"]}
    answers = []
    for part, found, extra in (("8", stored, {"quantization_config": eight}), ("32", exact, {})):
        other = tiny.write_target(tmp_path / part)
        save_file(found, other / "model.safetensors")
        (other / "config.json").write_text(json.dumps(config | extra))
        session = Session.load(other, None, dtype="float32", native=True)
        answers.append(session.run([list(range(9))], max_tokens=12).answers[0].tokens)
    assert answers[0] == answers[1]


def test_a_tensor_of_neither_text_nor_images_is_named(published, tmp_path):
    _, folder, tensors = published
    other = tiny.write_target(tmp_path)
    save_file(tensors | {"language_model.model.layers.0.self_attn.q_norm.weight": torch.ones(16)},
              other / "model.safetensors")
    (other / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="tensor model.layers.0.self_attn.q_norm.weight must not be there"):
        Session.load(other, None, dtype="float32")
