"""Models by their ids on the Hugging Face Hub: from the local cache, and nothing is asked of the network."""

import sys

import pytest

from dflash_decode import LLM, CheckpointError, load_checkpoint
from dflash_decode.checkpoint import CheckpointNotFound
from dflash_decode.checkpoint import hub as hub_cache
from dflash_decode.checkpoint.errors import read_json
from tests.support import tiny


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(id): the folder of this model in a cache that nothing else is in."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket", None)  # nothing is asked of the network

    def folder(name):
        made = tmp_path / f"models--{name.replace('/', '--')}"
        (made / "refs").mkdir(parents=True)
        (made / "refs" / "main").write_text("0123abc")
        (made / "snapshots" / "0123abc").mkdir(parents=True)
        return made / "snapshots" / "0123abc"

    return folder


def test_models_are_found_by_their_ids_in_the_cache(hub, models):
    tiny.write_target(hub("some/target"))
    tiny.write_drafter(hub("some/draft-b4"))
    with LLM("some/target", "some/draft-b4") as llm, LLM(models["model"], models["draft"]) as same:
        assert llm.session.drafter is not None and llm.session.drafter_name == "some/draft-b4"
        assert llm.chat("abc", max_tokens=5).token_ids == same.chat("abc", max_tokens=5).token_ids


def test_a_repository_of_gguf_files_may_have_a_config(hub, models):
    """And its files in folders, beside one that reads images."""
    folder = hub("some/gguf")
    (folder / "config.json").write_text("{}")
    (folder / "Q4_K_M").mkdir()
    for name in ("Q4_K_M/m-00001-of-00002.gguf", "Q4_K_M/m-00002-of-00002.gguf", "mmproj-m.gguf"):
        (folder / name).touch()
    assert hub_cache.find_cached("some/gguf") == folder / "Q4_K_M" / "m-00001-of-00002.gguf"
    (folder / "b.gguf").touch()
    with pytest.raises(CheckpointError, match="got 2 .gguf files: name one of them by its path"):
        hub_cache.find_cached("some/gguf")
    (folder / "model.safetensors").touch()
    assert hub_cache.find_cached("some/gguf") == folder


def test_models_that_are_not_in_the_cache_say_how_to_get_them(hub, models):
    fetch = r"which does not exist; to fetch it from the Hugging Face Hub: hf download some/{}$"
    with pytest.raises(CheckpointNotFound, match=fetch.format("model")):
        LLM("some/model")
    with pytest.raises(CheckpointNotFound, match=fetch.format("draft")):
        LLM(models["model"], "some/draft")
    folder = hub("some/part")
    with pytest.raises(CheckpointError, match="expected config.json or one .gguf file of some/part; got neither; "
                                              "to fetch all of it: hf download some/part$"):
        load_checkpoint("some/part")
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    with pytest.raises(CheckpointError, match="got 2 .gguf files: name one of them by its path, as .*/a.gguf$"):
        load_checkpoint("some/part")
    with pytest.raises(CheckpointNotFound, match="got 'a/b/c', which does not exist$"):
        load_checkpoint("a/b/c")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointNotFound, match="^'some/model' is no path; .*: pip install huggingface_hub$"):
        load_checkpoint("some/model")


def test_a_path_goes_before_an_id(hub, models, monkeypatch, tmp_path):
    hub("some/target")
    tiny.write_target(tmp_path / "some" / "target")
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("some/target").config == read_json(tmp_path / "some" / "target" / "config.json")


