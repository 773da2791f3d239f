"""Files that would hang a loader or eat memory, and those whose parts contradict each other."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

from safetensors.torch import save_file

from dflash_decode.checkpoint import CheckpointError, CheckpointNotFound, find_model, load_checkpoint, read_directory
from dflash_decode.checkpoint import errors as files
from dflash_decode.checkpoint.gguf import file as gguf_file
from dflash_decode.checkpoint.gguf import header as gguf_header
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from dflash_decode.model.native import NativeTarget
from dflash_decode.model.rope import Rope
from dflash_decode.model.vocabulary import read_mask_embedding, read_vocabulary
from tests.support import tiny
from tests.support.gguf_files import names_and_shapes, write_gguf

pytestmark = pytest.mark.timeout(60)  # of what reads a pipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


def sharded(folder, **extra):
    """Two shards of one tensor each; `extra` tensors are in the second, unknown to the index."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, folder / "s0.safetensors")
    save_file({"b": torch.full((2,), 2.0), **extra}, folder / "s1.safetensors")
    index(folder, a="s0.safetensors", b="s1.safetensors")
    return folder


def index(folder, **where):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


# ---- shards --------------------------------------------------------------------------------------------------------


def test_a_tensor_in_a_shard_that_the_index_does_not_name_for_it_does_not_win(tmp_path):
    folder = sharded(tmp_path / "m", a=torch.full((3,), -1.0), stray=torch.zeros(1))
    found = load_checkpoint(folder).tensors
    assert sorted(found) == ["a", "b"] and torch.equal(found["a"], torch.ones(2))
    index(folder, a="s1.safetensors", b="s1.safetensors")
    assert torch.equal(load_checkpoint(folder).tensors["a"], torch.full((3,), -1.0))
    index(folder, a="s0.safetensors", b="s0.safetensors")  # it is in the other file alone
    with pytest.raises(CheckpointError, match=r"index.json: expected 2 tensors .* the first is b \(listed in s0"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["..", ".", "", "a/../s0.safetensors", "/etc/passwd", "n" * 5000, "a\0b", "\ud800"])
def test_a_shard_of_a_strange_name(tmp_path, name):
    folder = sharded(tmp_path / "m")
    index(folder, a=name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize("name", ["n" * 5000, "\ud800"])
def test_a_tensor_of_a_strange_name(tmp_path, name):
    folder = sharded(tmp_path / "m")
    index(folder, a="s0.safetensors", **{name: "s1.safetensors"})
    with pytest.raises(CheckpointError, match=r"index.json: expected 2 tensors .* \(listed in s1") as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) <= 1000
    str(caught.value).encode()


# ---- what is no regular file ---------------------------------------------------------------------------------------


def pipe(file):
    os.mkfifo(file)


def device(file):
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("make, kind", [(pipe, "a named pipe"), (device, "a character device"),
                                        (os.mkdir, "a directory")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "s1.safetensors"])
def test_pipes_devices_and_directories_are_refused_unopened(tmp_path, name, make, kind):
    folder = sharded(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    for load in (load_checkpoint, read_directory):
        with pytest.raises(CheckpointError, match=rf"{name}: expected a regular file; got {kind}"):
            load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "vocab.txt",
                                  "other.safetensors"])
def test_pipes_that_another_reader_of_the_folder_would_open_are_refused(tmp_path, name):
    """transformers and the tokenizer open by themselves what they find."""
    folder = sharded(tmp_path / "m")
    pipe(folder / name)
    for load in (load_checkpoint, load_tokenizer, find_model):
        with pytest.raises(CheckpointError, match=rf"{name}: expected a regular file; got a named pipe"):
            load(folder)


@pytest.mark.parametrize("make, kind", [(pipe, "a named pipe"), (device, "a character device")])
def test_a_gguf_file_that_is_no_file(tmp_path, make, kind):
    make(tmp_path / "m.gguf")
    for load in (load_checkpoint, load_tokenizer):
        with pytest.raises(CheckpointError, match=f"m.gguf: a model must be .* or a .gguf file; got {kind}"):
            load(tmp_path / "m.gguf")


def test_side_files_of_a_drafter_that_are_no_files(tmp_path):
    pipe(tmp_path / "draft_vocabulary.json")
    with pytest.raises(CheckpointError, match="draft_vocabulary.json: expected a regular file; got a named pipe"):
        read_vocabulary(tmp_path)
    pipe(tmp_path / "mask_embedding.pt")
    with pytest.raises(NotImplementedError, match="mask_embedding.pt"):
        read_mask_embedding(tmp_path)


def test_paths_that_no_file_can_have(tmp_path):
    for path in ("n" * 5000, "a/" * 3000, "~nobody-of-this-name/x", "a\0b", ""):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert len(str(caught.value)) < 1000
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    with pytest.raises(CheckpointNotFound):
        load_checkpoint(tmp_path / "loop.gguf")


# ---- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_is_bounded_before_it_is_read(tmp_path, name):
    folder = sharded(tmp_path / "m")
    os.truncate(folder / name, 1 << 40)  # a hole
    with pytest.raises(CheckpointError, match=f"{name}: expected at most 67,108,864 bytes; got 1,099,511,627,776"):
        load_checkpoint(folder)


def test_json_of_a_file_that_says_it_is_empty_is_bounded_too(monkeypatch):
    with pytest.raises(CheckpointError, match="expected at most 10 bytes; got more"):
        files.read_text(files.Path("/proc/self/status"), most=10)


@pytest.mark.parametrize("text, message", [
    ('{"a": ' + "1" * 5000 + "}", "expected JSON; got Exceeds the limit"), ("[" * 10**6, "expected JSON; got maximum"),
    ("\ufeff{}", "expected JSON; got Unexpected UTF-8 BOM"), ('"text"', "expected a JSON object; got str"),
])
def test_json_that_python_does_not_read(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        load_checkpoint(tmp_path)


def test_a_vocabulary_of_wrong_numbers(tmp_path):
    for bad in ([10**400], [-1], [True], [2**31], [[1]], "1", {"1": 2}, None, [float("nan")]):
        (tmp_path / "draft_vocabulary.json").write_text(json.dumps({"token_ids": bad}))
        with pytest.raises(CheckpointError, match="draft_vocabulary.json: token_ids must be a list of distinct token"):
            read_vocabulary(tmp_path)


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def gguf_bytes(*fields, tensors=0, count=None, order="<"):
    body = b"".join(struct.pack(order + "Q", len(key)) + key + value for key, value in fields)
    counts = struct.pack(order + "IQQ", 3, tensors, len(fields) if count is None else count)
    return b"GGUF" + counts + body


def array(kind, count, items=b""):
    return struct.pack("<IIQ", 9, kind, count) + items


@pytest.mark.parametrize("content, message", [
    (gguf_bytes((b"k", array(0, 2**60))), "an array 'k' of 1152921504606846976 items, where at most"),
    (gguf_bytes((b"k", array(0, 2**22))), "the array 'k' of 4194304 bytes at byte"),
    (gguf_bytes((b"k", array(8, 2**22))), "an item of 'k' of 8 bytes at byte 49, beyond the file's 49"),
    (gguf_bytes((b"k", array(9, 1, array(0, 1)))), "the type 9 for 'k'"),
    (gguf_bytes((b"k", struct.pack("<IQ", 8, 2**63))), "the value of 'k' of 9223372036854775808 bytes"),
    (gguf_bytes((b"k", struct.pack("<I", 77))), "the type 77 for 'k'"),
    (gguf_bytes((b"k", struct.pack("<I", 4))), "the value of 'k' of 4 bytes"),
    (gguf_bytes(count=2**63), "9223372036854775808 fields, where at most 65536"),
    (gguf_bytes(count=2**16), "a field's key of 8 bytes at byte 24, beyond"),
    (gguf_bytes(tensors=2**40), "1099511627776 tensors, where at most 65536"),
    (gguf_bytes(tensors=1) + struct.pack("<QI", 0, 2**31), "2147483648 dimensions of ''"),
    (gguf_bytes(tensors=1) + struct.pack("<QIQQIQ", 0, 2, 2**62, 2**62, 0, 0), "do not fit into 64 bytes"),
    (gguf_bytes(tensors=2) + struct.pack("<QIQIQ", 0, 1, 400, 0, 0) * 2, "tensors of 800 elements, which do not fit"),
    (b"GGUF" * 5, "20 bytes, which is less than a header"),
    (b"GGUF" + b"\xff" * 40, "tensors, where at most"),
])
def test_a_gguf_header_is_held_against_the_files_size(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    assert gguf_file  # imported, so that it does not count
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"m\.gguf: expected a GGUF file; got .*{message}"):
            load_checkpoint(tmp_path / "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_both_byte_orders_of_a_header_are_walked(tmp_path):
    (tmp_path / "m.gguf").write_bytes(gguf_bytes((b"k", struct.pack(">II", 4, 7)), order=">"))
    gguf_header.check_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("changes, message", [
    ({"ARCH__block_count": 10**8}, "llama.block_count must be an integer of at most 10000; got 100000000"),
    ({"ARCH__block_count": 9999}, "expected a tensor blk.2.attn_norm.weight; got none"),
    ({"ARCH__attention__head_count": 2**31}, "head_count must be an integer of at most 2147483647; got 2147483648"),
    ({"ARCH__attention__head_count": [4, 4]}, r"head_count must be an integer of at least 1; got \[4, 4\]"),
    ({"ARCH__attention__key_length": 10**6}, "key_length must be an integer of at most 1024; got 1000000"),
    ({"ARCH__attention__layer_norm_rms_epsilon": float("nan")}, "must be a number above 0 and at most 1; got nan"),
    ({"ARCH__attention__layer_norm_rms_epsilon": 0.0}, "epsilon must be a number above 0 and at most 1; got 0.0"),
    ({"ARCH__rope__freq_base": -1.0}, "freq_base must be a number above 1; got -1.0"),
    ({"ARCH__rope__freq_base": float("inf")}, "freq_base must be a number above 1; got inf"),
    ({"ARCH__rope__scaling__type": "linear", "ARCH__rope__scaling__factor": 0.0}, "factor must be a number above 0"),
    ({"ARCH__rope__dimension_count": True}, "dimension_count must be an integer of at least 1; got True"),
    ({"ARCH__rope__scaling__attn_factor": float("nan")}, "attn_factor must be a number; got nan"),
    ({"general__alignment": 3}, "expected a GGUF file; got Invalid alignment"),
])
def test_gguf_numbers_out_of_range(tmp_path, changes, message):
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: .*{message}"):
        load_checkpoint(tmp_path / "m.gguf")


def test_gguf_names_are_checked_before_anything_is_dequantised(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf.quants.dequantize", lambda *a: pytest.fail("dequantised"))
    names = [n for n, _ in names_and_shapes("llama")]
    write_gguf(tmp_path / "m.gguf", drop=names[-1:])
    with pytest.raises(CheckpointError, match=f"expected a tensor {names[-1]}"):
        load_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (2, 4, 32)])
def test_gguf_tensors_of_other_shapes(tmp_path, shape):
    tensors = {n: np.ones(s, np.float32) for n, s in names_and_shapes("llama")}
    for name in ("blk.0.attn_q.weight", "token_embd.weight"):
        write_gguf(tmp_path / "m.gguf", tensors=tensors | {name: np.ones(shape, np.float32)})
        with pytest.raises(CheckpointError, match=rf"m\.gguf: {name} must have .*2 dimensions.*; got "):
            load_checkpoint(tmp_path / "m.gguf")


# ---- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "int32", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight",
                                  "model.norm.weight"])
def test_a_weight_of_a_type_that_is_no_weight(tmp_path, name, dtype):
    found = load_checkpoint(tiny.write_target(tmp_path / "m"))
    like = torch.zeros(found.tensors[name].shape, dtype=getattr(torch, dtype))
    with pytest.raises(ValueError, match=rf"{name} must be .*float32, bfloat16.*; got (torch\.)?{dtype}"):
        NativeTarget(found.config, found.tensors | {name: like})


@pytest.mark.parametrize("most", [10**9, 10_485_760])
def test_a_context_longer_than_memory_costs_what_is_used_of_it(tmp_path, most):
    """A table of 10^9 positions would have 256 GB; the rows that a pass can reach are the short context's."""
    from dflash_decode.model.drafter import Drafter
    from dflash_decode.requests import Request
    from tests.support.decode_runs import run

    found = load_checkpoint(tiny.write_target(tmp_path / "m"))

    def make(context):
        target = NativeTarget(found.config | {"max_position_embeddings": context}, found.tensors)
        assert target.max_context == context
        return target, Drafter.random(target, num_layers=2, block_size=4)

    def answer(models, room, tokens):
        return run(*models, [Request(0, [1, 2, 3], tokens)], max_context=room, max_batch=1)

    long = make(most)
    for room, tokens in ((16, 8), (64, 60)):  # the second needs a longer table than the first has made
        assert answer(long, room, tokens) == answer(make(tiny.CONTEXT), room, tokens)
    table = long[0]._tables.reaching(long[0].cache.allocate(4, 16), 4)[0]
    assert torch.equal(table[:16], Rope(10000.0, tiny.HEAD_DIM).table(16)) and 68 <= len(table) <= 128


@pytest.mark.parametrize("change", [{"n_embd": [1]}, {"n_head": 0}, {"vocab_size": 65}, {"layer_norm_epsilon": "x"},
                                    {"model_type": ["gpt2"]}, {"n_positions": float("nan")}])
def test_what_transformers_does_not_load_is_a_checkpoint_error(tmp_path, change):
    transformers = pytest.importorskip("transformers")
    from dflash_decode.session import _target

    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'm'}: "):
        _target(str(tmp_path / "m"), change.get("model_type", "gpt2"), torch.float32, torch.device("cpu"), "model")
