"""GGUF weights that are kept in the file's blocks."""

import warnings

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

import gguf

from dflash_decode import Session
from dflash_decode.checkpoint import Blocks, CheckpointError, load_checkpoint
from dflash_decode.checkpoint.blocks import FORMATS
from dflash_decode.checkpoint.gguf import cache as gguf_cache
from dflash_decode.checkpoint.gguf import file as gguf_file
from dflash_decode.lossless import _next_logits
from dflash_kernels import formats, reference
from dflash_kernels.testing import same_bits
from tests.support.gguf_files import HIDDEN, VOCAB, quantised, write_gguf

TYPE = gguf.GGMLQuantizationType
# Several in one file, as in those that llama.cpp calls Q4_K_M: values have another format than queries and keys.
MIXED = {"attn_q": TYPE.Q4_0, "attn_k": TYPE.Q4_0, "attn_v": TYPE.Q8_0, "ffn_gate": TYPE.Q5_1, "ffn_up": TYPE.Q5_1,
         "ffn_down": TYPE.Q5_0, "attn_output": TYPE.Q4_0, "token_embd": TYPE.Q8_0}
PROMPT = [3, 7, 1, 20]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


def model(tmp_path, types=MIXED, **changes):
    write_gguf(tmp_path / "m.gguf", tensors=quantised(types), tokenizer__chat_template="{{ bos_token }}", **changes)
    return tmp_path / "m.gguf"


def test_blocks_stay_as_they_are_and_are_cached(tmp_path, monkeypatch):
    file = model(tmp_path)
    elements, first = load_checkpoint(file), load_checkpoint(file, blocks=True)
    kept = {name: t for name, t in first.tensors.items() if isinstance(t, Blocks)}
    assert len(kept) == 1 + 7 * 2 and kept["model.embed_tokens.weight"].shape == (VOCAB, HIDDEN)
    assert {t.format for t in kept.values()} == {"q4_0", "q5_0", "q5_1", "q8_0"}
    for name, t in first.tensors.items():
        if name in kept:
            n, k = t.shape
            t = reference.quant.widen(reference.quant.pack(t.data, t.format), t.format, n, k).bfloat16()
        assert torch.equal(t, elements.tensors[name]), name
    monkeypatch.setattr(gguf_file, "open_file", lambda path: pytest.fail("the cache was not used"))
    again = load_checkpoint(file, blocks=True)
    assert again.config == first.config == elements.config and gguf_file.has_blocks(file)
    for name, t in again.tensors.items():
        same = (t.format, t.shape) == (kept[name].format, kept[name].shape) and torch.equal(t.data, kept[name].data) \
            if name in kept else torch.equal(t, first.tensors[name])
        assert same, name
    assert gguf_cache.cached(file) and gguf_cache.cached(file, blocks=True), "one form must not remove the other"


def test_formats_that_stay_in_blocks_are_part_of_what_is_cached(tmp_path, monkeypatch):
    file = model(tmp_path)
    load_checkpoint(file, blocks=True)
    monkeypatch.setattr(gguf_cache, "FORMATS", {name: f for name, f in FORMATS.items() if name != "q5_1"})
    assert not gguf_cache.cached(file, blocks=True), "kept by a version with other formats"


def test_exact_blocks_give_the_output_of_the_expanded_model(tmp_path):
    file = model(tmp_path)
    model_, exact, kept = (Session.load(file, None, weights=w) for w in ("model", "exact", "file"))
    logits = [_next_logits(s.target, PROMPT) for s in (model_, exact, kept)]
    assert same_bits(logits[0], logits[1]) and not same_bits(logits[0], logits[2])
    assert torch.cosine_similarity(logits[0], logits[2], 0) > 0.98
    assert kept.target.head is kept.target.embedding, "one copy serves both"


@pytest.mark.parametrize("weights", ["file", "exact"])
def test_speculative_text_is_the_same_model_s_baseline_text(tmp_path, weights):
    session = Session.load(model(tmp_path), "random", weights=weights, block_size=4)
    prompts = [PROMPT, [5], [9, 9, 2]]
    drafted, baseline = (session.run(prompts, max_tokens=20, speculative=s, concurrency=2) for s in (True, False))
    assert [a.tokens for a in drafted.answers] == [a.tokens for a in baseline.answers]


def test_auto_keeps_blocks_where_there_are_some(tmp_path):
    assert Session.load(model(tmp_path), None).weights == "file"
    write_gguf(tmp_path / "plain.gguf", tokenizer__chat_template="{{ bos_token }}")
    assert Session.load(tmp_path / "plain.gguf", None).weights == "model"


def test_other_formats_are_expanded_and_named_once(tmp_path):
    file = model(tmp_path, MIXED | {"ffn_down": TYPE.MXFP4, "attn_v": TYPE.MXFP4})
    with pytest.warns(UserWarning, match="weights in MXFP4 are expanded to bfloat16; q4_0, .* stay") as told:
        tensors = load_checkpoint(file, blocks=True).tensors
    assert len(told) == 1 and torch.is_tensor(tensors["model.layers.0.mlp.down_proj.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(file)


def test_the_formats_are_those_of_the_ops():
    assert {name: (f.block, f.bytes) for name, f in formats.FORMATS.items()} == FORMATS


def test_blocks_need_a_gguf_file(models):
    for weights in ("file", "exact"):
        with pytest.raises(CheckpointError, match=f"weights '{weights}' must be those of a .gguf file on a CPU; got a"):
            Session.load(models["model"], None, weights=weights)


def _type_at(data, name):
    """Where a tensor's type is in a file's header: behind its name, the number of dimensions and two of them."""
    return data.index(name.encode()) + len(name) + 4 + 2 * 8


@pytest.mark.parametrize("damage,message", [
    (lambda data: data[:-200], "expected a GGUF file; got"),
    (lambda data: data[:_type_at(data, "blk.0.ffn_up.weight")] + (99).to_bytes(4, "little")
     + data[_type_at(data, "blk.0.ffn_up.weight") + 4:], "expected a GGUF file; got .*99.* is not a valid"),
    (lambda data: data[:_type_at(data, "blk.0.ffn_up.weight") - 16] + (33).to_bytes(8, "little")
     + data[_type_at(data, "blk.0.ffn_up.weight") - 8:], "expected a GGUF file; got"),
    (lambda data: data[:_type_at(data, "blk.0.ffn_up.weight") - 8] + (32).to_bytes(8, "little")
     + data[_type_at(data, "blk.0.ffn_up.weight"):], "mlp.up_proj.weight must have shape"),
], ids=["truncated", "unknown type", "a block count that does not fit", "too few rows"])
def test_damage_is_named_and_nothing_is_kept(tmp_path, damage, message):
    file = model(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        Session.load(file, None, weights="file")
    if "must have shape" not in message:  # a header that is whole: it describes another model
        assert not gguf_cache.cached(file) and not gguf_cache.cached(file, blocks=True)
