"""GGUF models in several files."""

import os

import gguf
import pytest
import torch

pytest.importorskip("safetensors")

from dflash_decode.checkpoint import CheckpointError, load_checkpoint
from dflash_decode.checkpoint.gguf import cache as gguf_cache
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from tests.support.gguf_files import write_gguf

COUNT = 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


def part(folder, number, count=COUNT):
    return folder / f"m-{number:05d}-of-{count:05d}.gguf"


def write_parts(folder, tensors, numbers=range(COUNT), total=None, repeated=None):
    """The tensors in three files; the second and third have the numbers of their parts alone. numbers: what each says
    of itself. repeated: a tensor that the last has too."""
    names = sorted(tensors)
    for i, number in enumerate(numbers):
        mine = {name: tensors[name] for name in [*names[i::COUNT], *([repeated] if repeated and i == 2 else [])]}
        split = {"split.no": number, "split.count": COUNT, "split.tensors.count": total or len(names)}
        if i == 0:
            write_gguf(part(folder, 1), tensors=mine, tokenizer__chat_template="x",
                       **{key.replace(".", "__"): value for key, value in split.items()})
            continue
        writer = gguf.GGUFWriter(part(folder, i + 1), "llama")
        for key, value in split.items():
            writer.add_uint16(key, value)
        for name, values in mine.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@pytest.fixture
def whole(tmp_path):
    return write_gguf(tmp_path / "whole.gguf", tokenizer__chat_template="x")


def test_any_part_names_the_model(tmp_path, whole):
    write_parts(tmp_path, whole)
    want = load_checkpoint(tmp_path / "whole.gguf")
    for number in (2, 1, 3):  # the first from the files, the others from the cache
        found = load_checkpoint(part(tmp_path, number))
        assert found.source == str(part(tmp_path, 1)) and found.config == want.config
        assert found.tensors.keys() == want.tensors.keys()
        assert all(torch.equal(t, want.tensors[name]) for name, t in found.tensors.items())
        assert load_tokenizer(part(tmp_path, number)).encode("ab") == [3]
    kept = gguf_cache.cached(part(tmp_path, 1))
    os.utime(part(tmp_path, 2), ns=(1, 1))
    assert kept and gguf_cache.cached(part(tmp_path, 1)) is None, "another state of a part"


def test_parts_behind_links_stay_in_the_cache(tmp_path, whole):
    """As in huggingface_hub's cache, whose files have other names."""
    (tmp_path / "blobs").mkdir()
    write_parts(tmp_path, whole)
    for number in (1, 2, 3):
        blob = part(tmp_path, number).rename(tmp_path / "blobs" / str(number))
        part(tmp_path, number).symlink_to(blob)
    load_checkpoint(part(tmp_path, 2))
    load_checkpoint(tmp_path / "whole.gguf")  # which looks for entries that are stale
    assert gguf_cache.cached(part(tmp_path, 1))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_part_is_named(tmp_path, whole, number):
    write_parts(tmp_path, whole)
    part(tmp_path, number).unlink()
    with pytest.raises(CheckpointError, match=rf"m-0000{number}-of-00003.gguf: expected this file; got none .part"):
        load_checkpoint(part(tmp_path, 1 if number > 1 else 2))


@pytest.mark.parametrize(("how", "message"), [
    ({"numbers": (0, 2, 2)}, "m-00002-of-00003.gguf: split.no must be 1, as its name says; got 2"),
    ({"numbers": (0, 0, 1)}, "m-00002-of-00003.gguf: split.no must be 1, as its name says; got 0"),
    ({"total": 99}, "the parts must have 99 tensors, as split.tensors.count says; got 20"),
    ({"repeated": "blk.0.attn_k.weight"}, "m-00003-of-00003.gguf: blk.0.attn_k.weight must be in one part; got"),
])
def test_parts_that_do_not_belong_together(tmp_path, whole, how, message):
    write_parts(tmp_path, whole, **how)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(part(tmp_path, 3))


def test_names_that_do_not_fit(tmp_path, whole):
    write_parts(tmp_path, whole)
    part(tmp_path, 1).rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match="the file of a model in 3 parts must be named NAME-00001-of-"):
        load_checkpoint(tmp_path / "alone.gguf")
    write_gguf(part(tmp_path, 4))
    with pytest.raises(CheckpointError, match="the number of a part must be between 1 and 3; got 4|m-00001-of"):
        load_checkpoint(part(tmp_path, 4))


def test_a_part_that_is_cut_off(tmp_path, whole):
    write_parts(tmp_path, whole)
    part(tmp_path, 2).write_bytes(part(tmp_path, 2).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="m-00002-of-00003.gguf: expected a GGUF file; got"):
        load_checkpoint(part(tmp_path, 1))
    assert not gguf_cache.cached(part(tmp_path, 1))
