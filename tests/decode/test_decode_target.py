"""The native target against transformers: logits, features, refusals."""

import pytest
import torch

from dflash_decode.checkpoint import Blocks
from dflash_decode.kv import NO_PAGE, PagePool
from dflash_decode.model import families
from dflash_decode.model.native import NativeTarget
from dflash_decode.model.target_config import read_target_config
from dflash_decode.step import Prefill
from dflash_kernels import quantize_blocks
from dflash_kernels.testing import assert_within_budget, same_bits

transformers = pytest.importorskip("transformers")
from tests.support.decode_models import COMMON, EXPERTS, FAMILIES, VOCAB, make_target  # noqa: E402

PAGE, TABLE = 4, torch.tensor([[5, 3, 1, 7, 2, 0, NO_PAGE]], dtype=torch.int32)


def forward(target, ids, target_layer_ids, chunks):
    """(features, logits) of one prompt in `chunks`, in poisoned pages out of order."""
    kv = target.cache.allocate(8, PAGE)
    for cache in kv:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    features, rows, done = [], [], 0
    for n in chunks:
        work = target.make_pass(1, n + 2, kv, target_layer_ids)
        positions = torch.zeros(1, n + 2, dtype=torch.int64)
        positions[0, :n] = done + torch.arange(n)
        slots = TABLE[0].long()[positions // PAGE] * PAGE + positions % PAGE
        slots[0, n:] = -1
        block = torch.full((1, n + 2), VOCAB + 5)
        block[0, :n] = ids[done:done + n]
        lens = [torch.tensor([value], dtype=torch.int32) for value in (done, n)]
        out, collected = work.run(block, positions, slots, TABLE, *lens)
        rows.append(out[:n].clone())
        features.append(collected[:n].clone())
        done += n
    return torch.cat(features), torch.cat(rows)


@pytest.mark.parametrize(("family", "dtype"), [
    *(pytest.param(family, torch.float32, id=f"{family}-f32") for family in FAMILIES),
    *(pytest.param(family, torch.bfloat16, id=f"{family}-bf16") for family in FAMILIES if family not in EXPERTS)])
@torch.no_grad()
def test_p9_p10_features_and_logits_are_those_of_transformers(family, dtype):
    """Hidden states in the order asked for, the last layer's after the final norm, as dflash's own features have it.
    In 16 bits a router can choose other experts at a near tie, so that errors have no bound."""
    model, target = make_target(family, dtype)
    ids, target_layer_ids = torch.randint(0, VOCAB, (23,)), (2, 0, 3)
    features, rows = forward(target, ids, target_layer_ids, [23])
    peer = model(ids[None], output_hidden_states=True)
    truth = model.double()(ids[None], output_hidden_states=True)
    want, same = (torch.cat([o.hidden_states[i + 1][0] for i in target_layer_ids], -1) for o in (truth, peer))
    width = COMMON["hidden_size"]
    for f in range(len(target_layer_ids)):
        part = slice(f * width, (f + 1) * width)
        assert_within_budget(features[:, part], want[:, part], same[:, part], name=f"layer {target_layer_ids[f]}")
    assert same_bits(rows, features[:, 2 * width:])
    got = torch.zeros(23, dtype=torch.int64)
    target.next_ids(rows, got, torch.zeros(23))
    if dtype == torch.float32:
        assert torch.equal(got, truth.logits[0].argmax(-1))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("chunks", [[1] * 23, [8, 8, 7], [3, 16, 4], [22, 1]])
def test_chunks_change_no_bit(family, chunks):
    _, target = make_target(family, torch.bfloat16)
    ids = torch.randint(0, VOCAB, (23,))
    whole = forward(target, ids, (1, 3), [23])
    parts = forward(target, ids, (1, 3), chunks)
    assert same_bits(parts[0], whole[0]) and same_bits(parts[1], whole[1])


def test_p8_a_tap_one_layer_off_is_another_feature():
    _, target = make_target("llama")
    ids = torch.randint(0, VOCAB, (5,))
    features = forward(target, ids, (0, 1, 2, 3), [5])[0].view(5, 4, -1)
    for i in range(3):
        assert (features[:, i] - features[:, i + 1]).abs().max() > 0.1


def test_prefill_gives_the_next_token():
    model, target = make_target("qwen3")
    pool = PagePool(8, PAGE)
    work = Prefill(target, None, target.cache.allocate(8, PAGE), (), 16, PAGE, 8)
    table = pool.table_row(pool.allocate(20), 8)
    prompt = list(range(20))
    work(prompt[:16], 0, table)
    row, got = work(prompt[16:], 16, table), torch.zeros(1, dtype=torch.int64)
    target.next_ids(row, got, torch.zeros(1))
    with torch.no_grad():
        assert int(got) == int(model(torch.tensor([prompt])).logits[0, -1].argmax())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_in_8_bits_it_is_the_model_whose_weights_are_rounded(family):
    """Products' weights alone: not the embedding, the norms or the biases."""
    model, whole = make_target(family)
    config, ids = model.config.to_dict(), torch.randint(0, VOCAB, (23,))
    tensors = model.state_dict()
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    rounded = {name: Blocks(quantize_blocks(t, "q8_0"), "q8_0") if t.dim() == 2 and "embed" not in name else t
               for name, t in (tensors | {"lm_head.weight": head}).items()}
    eight = NativeTarget(config, tensors, int8=True)
    want = NativeTarget(config | {"tie_word_embeddings": False}, rounded)
    (_, got), (_, exact), (_, other) = (forward(t, ids, (), [23]) for t in (eight, want, whole))
    assert same_bits(got, exact) and 0.99 < torch.cosine_similarity(got.flatten(), other.flatten(), 0) < 1
    assert same_bits(got, torch.cat([forward(eight, ids, (), [5, 18])[1]]))


@pytest.mark.parametrize(("changes", "match"), [
    ({"model_type": "klingon"}, "model_type must be one of cwm, .*, llama, .*, smollm3; got 'klingon'"),
    ({"model_type": "cohere2"}, "got 'cohere2', whose norms subtract the mean, which no op does"),
    ({"model_type": None}, "model_type must be .* got nothing"),
    ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types must all be full_attention in a llama"),
    ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 4}, "sliding_attention or full_attention; got 'ch"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' changes the model"), ({"num_experts": 4}, "num_experts = 4"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"rope_interleaved": True}, "rope_interleaved"),
    ({"rope_scaling": {"rope_type": "su", "factor": 2.0}, "rope_parameters": None}, "rope type must be .* got 'su'"),
])
def test_what_changes_the_arithmetic_is_refused_by_name(changes, match):
    model, _ = make_target("llama")
    with pytest.raises(NotImplementedError, match=match):
        NativeTarget({**model.config.to_dict(), **changes}, model.state_dict())


def test_a_config_that_does_not_say_is_as_the_family_s_class_has_it():
    """transformers leaves out of a config.json what its class has by default."""
    for name, family in families.FAMILIES.items():
        if name in transformers.CONFIG_MAPPING:
            config = transformers.CONFIG_MAPPING[name]()
            assert family.tied == config.get_text_config().tie_word_embeddings, name
            said = {key: value for key, value in config.to_dict().items() if value is not None and key not in (
                "sliding_window", "layer_types", "rope_theta", "partial_rotary_factor", "no_rope_layers")}
            ropes = {key: value for key, value in said.get("rope_parameters", {}).items()
                     if key not in ("partial_rotary_factor", *(("rope_theta",) if name in ("smollm3", "cwm") else ()))}
            said |= {"head_dim": 128} if name == "glm4_moe" else {}
            read = read_target_config(said | {"model_type": name, "rope_parameters": ropes})
            given = config.rope_parameters
            assert {rope.theta for rope in read.ropes if rope.rotary_dim} == {given["rope_theta"]}, name
            assert read.ropes[0].rotary_dim == read.geometry.head_dim * given.get("partial_rotary_factor", 1), name
            windows = {mask.window[0] + 1 for mask in read.masks} - {0}
            assert windows == ({config.sliding_window} if getattr(config, "sliding_window", None) else set()), name
    assert families.FAMILIES["smollm3"].tied


@pytest.mark.parametrize("factor, most", [(4.0, 131072), (0.5, 32768)])
def test_yarn_lengthens_the_context(factor, most):
    """As model cards ask for it, with max_position_embeddings as it was."""
    model, _ = make_target("llama")
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    config = {**model.config.to_dict(), "max_position_embeddings": 32768, "rope_parameters": yarn, "rope_theta": None}
    assert read_target_config(config).max_context == most


def test_missing_and_wrong_fields_and_tensors_are_named():
    model, _ = make_target("llama")
    config, tensors = model.config.to_dict(), dict(model.state_dict())
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got nothing"):
            NativeTarget({**config, name: None}, tensors)
    with pytest.raises(ValueError, match="num_attention_heads must be a multiple of num_key_value_heads; got 4 and 3"):
        NativeTarget({**config, "num_key_value_heads": 3}, tensors)
    with pytest.raises(ValueError, match="max_context must be between 1 and max_position_embeddings = 512; got 513"):
        NativeTarget(config, tensors, max_context=513)
    name = "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"tensor {name} must have shape \(96, 64\); got \(95, 64\)"):
        NativeTarget(config, {**tensors, name: tensors[name][1:]})
    with pytest.raises(ValueError, match="tensor model.embed_tokens.weight must be there"):
        NativeTarget(config, {k: t for k, t in tensors.items() if "embed" not in k})
    with pytest.raises(ValueError, match="tensor model.layers.4.x must not be there"):
        NativeTarget(config, {**tensors, "model.layers.4.x": torch.zeros(1)})
    NativeTarget(config, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
