"""What loaders of drafters elsewhere, and ours, got wrong without a word; each test begins with its report's number."""

import warnings

import pytest
import torch

from dflash_decode.checkpoint import CheckpointError, load_checkpoint
from dflash_decode.loop import Decoder
from dflash_decode.model.config import LayerMask, read_draft_config
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.rope import read_rope
from dflash_decode.model.vocabulary import read_mask_embedding
from dflash_decode.requests import Request

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from tests.support import tiny  # noqa: E402
from tests.support.decode_models import VOCAB, make_target  # noqa: E402
from tests.support.drafters import HIDDEN, Served, draft_config, make, random_tensors  # noqa: E402

SLIDES = {"use_sliding_window": True, "sliding_window": 6}


def hidden(drafter, lengths=(9, 2), anchors=(1, 2)):
    return Served(drafter, list(lengths)).commit_all().draft(list(anchors))


def test_p43_max_window_layers_is_28_where_the_config_does_not_say():
    """transformers' class then leaves the layers of a small drafter full, and so not causal."""
    assert read_draft_config(draft_config(SLIDES)).masks == (LayerMask(),) * 3
    class_types = transformers.Qwen3Config(**{k: v for k, v in draft_config(SLIDES).items() if k != "dflash_config"})
    assert class_types.layer_types == ["full_attention"] * 3
    told = read_draft_config(draft_config(SLIDES | {"max_window_layers": 2})).masks
    assert told == (LayerMask(), LayerMask(), LayerMask(True, (5, -1)))
    types = {"layer_types": ["sliding_attention"] * 3, "sliding_window": 6, "model_type": "qwen3"}
    assert transformers.Qwen3Config(**types, num_hidden_layers=3).sliding_window is None
    with pytest.raises(ValueError, match="use_sliding_window must be true where .* model_type qwen3 .* got nothing"):
        read_draft_config(draft_config(types))
    many = draft_config(SLIDES | {"num_hidden_layers": 30})
    assert [mask.causal for mask in read_draft_config(many).masks] == [False] * 28 + [True] * 2


def test_p37_the_mask_tokens_own_embedding_is_read_beside_the_weights(tmp_path):
    config, tensors, _, plain = make({}, torch.float32)
    row = torch.randn(1, HIDDEN)
    save_file({"mask_embedding": row}, tmp_path / "mask_embedding.safetensors")
    save_file(tensors, tmp_path / "drafter.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = load_checkpoint(tmp_path)  # weights under another name, and still one file of them
    assert found.tensors.keys() == tensors.keys()
    _, target = make_target("llama")
    before = target.embedding.clone()
    drafter = Drafter(config, {**found.tensors, **read_mask_embedding(tmp_path)}, target)
    assert torch.equal(drafter.embedding[7], row[0]) and torch.equal(target.embedding, before)
    others = torch.arange(VOCAB) != 7
    assert torch.equal(drafter.embedding[others], before[others])
    assert not torch.allclose(hidden(drafter)[0], hidden(plain)[0])
    with pytest.raises(ValueError, match=r"mask_embedding must have shape \(64,\); got \(65,\)"):
        Drafter(config, {**tensors, "mask_embedding": torch.zeros(65)}, target)
    save_file({"a": row, "b": row + 1}, tmp_path / "mask_embedding.safetensors")
    with pytest.raises(CheckpointError, match="expected the tensor mask_embedding alone; got 2 tensors"):
        read_mask_embedding(tmp_path)


def gemma(dtype=torch.float32):
    from dflash_decode.model.hf import HFTarget

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, max_position_embeddings=512, sliding_window=512)
    return HFTarget(transformers.Gemma3ForCausalLM(config).to(dtype).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p36_a_gemma_target_hands_its_drafter_the_scaled_embedding(dtype):
    target = gemma(dtype)
    ids = torch.tensor([3, 7, 50])
    table = target.model.get_input_embeddings()
    assert target.embedding_scale == HIDDEN ** 0.5
    drafter = Drafter(draft_config({}), random_tensors(draft_config({}), dtype), target)
    assert torch.equal(drafter.embedding[ids], table(ids)) and not torch.equal(table(ids), table.weight[ids])
    told = draft_config({"input_embedding_scale": 4.0})  # says the whole factor
    drafter = Drafter(told, random_tensors(told, dtype), target)
    assert torch.equal(drafter.embedding[ids], table.weight[ids] * 4.0)
    own = random_tensors(draft_config({}), dtype) | {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN).to(dtype)}
    assert torch.equal(Drafter(draft_config({}), own, target).embedding, own["embed_tokens.weight"])


def test_p49_a_tied_drafters_own_embedding_is_its_head():
    _, target = make_target("llama")
    config = draft_config({"tie_word_embeddings": True, "input_embedding_scale": 3.0})
    tensors = random_tensors(config, torch.float32)
    assert Drafter(config, tensors, target).head is target.head
    own = torch.randn(VOCAB, HIDDEN)
    drafter = Drafter(config, tensors | {"embed_tokens.weight": own}, target)
    rows, ids = hidden(drafter)
    assert torch.equal(drafter.head.rows(torch.arange(VOCAB)), own) and torch.equal(drafter.embedding, own * 3.0)
    assert torch.equal(ids[:, 1:], (rows[:, 1:] @ own.T).argmax(-1))
    shared = Drafter({**config, "has_own_lm_head": False}, tensors | {"embed_tokens.weight": own}, target)
    assert shared.head is target.head
    head = torch.randn(VOCAB, HIDDEN)
    rows, ids = hidden(Drafter(config, tensors | {"embed_tokens.weight": own, "lm_head.weight": head}, target))
    assert torch.equal(ids[:, 1:], (rows[:, 1:] @ head.T).argmax(-1))


def test_p47_a_rotary_base_is_given_once_and_never_guessed():
    """Engines assume 10,000 or 1,000,000 where a drafter's config has none."""
    config = {k: v for k, v in draft_config({}).items() if k != "rope_parameters"}
    with pytest.raises(ValueError, match="draft config: rope_theta must be a number above 1; got nothing"):
        read_draft_config(config)
    for two in ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7}},
                {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 1e7}}):
        with pytest.raises(ValueError, match=r"rope_theta must be the same .*; got \[1"):
            read_draft_config(config | two)
        with pytest.raises(ValueError, match="target config: rope_theta must be the same"):
            read_rope(two, 16, "target config")
    for one in ({"rope_theta": 1e7}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}},
                {"rope_theta": 1e7, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000}}):
        assert read_draft_config(config | one).ropes[0].theta == 1e7
    assert read_rope({}, 16, "target config").theta == 1e4


def test_p46_a_context_beyond_the_drafters_trained_one_is_said_once():
    _, target = make_target("llama")
    config = draft_config({"max_position_embeddings": 24})
    drafter = Drafter(config, random_tensors(config, torch.float32), target)
    decoder = Decoder(target, drafter, max_batch=2, page_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.submit(Request(0, list(range(12)), 12))
        with pytest.warns(UserWarning, match="beyond 24 tokens, the drafter's max_position_embeddings, .* got 25"):
            decoder.submit(Request(1, list(range(13)), 12))
        decoder.submit(Request(2, list(range(13)), 12))


def test_p46_sessions_warn_too(tmp_path):
    from dflash_decode import Session

    pair = tiny.write_target(tmp_path / "m"), tiny.write_drafter(tmp_path / "d", max_position_embeddings=16)
    session = Session.load(*pair, dtype="float32", block_size=4)
    with pytest.warns(UserWarning, match="max_position_embeddings"):
        session.run([[1] * 20], max_tokens=2)
