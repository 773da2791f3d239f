"""What GGUF files say in more ways than one: ends of turns, linear RoPE, named chat templates, the byte order."""

import gguf
import numpy as np
import pytest

from dflash_decode.checkpoint import CheckpointError, load_checkpoint
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from tests.support.gguf_files import DROP, VOCAB, write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


def tokens(*ends):
    found = ["<e>", "a", "b", "ab", *ends]
    return {"tokenizer__ggml__tokens": found + [f"t{i}" for i in range(VOCAB - len(found))]}


@pytest.mark.parametrize("ends, more, stops", [
    ((), {}, (0,)), (("<|end|>",), {}, (0, 4)),  # Phi-3: turns end otherwise than texts
    (("<end_of_turn>", "x"), {"tokenizer__ggml__eos_token_id": 1}, (1, 4)),  # Gemma 3
    (("<|return|>", "<|end|>", "<|call|>"), {"tokenizer__ggml__eos_token_id": 4}, (4, 6)),  # gpt-oss: <|end|> goes on
    (("y", "<|eot_id|>", "<|eom_id|>"), {"tokenizer__ggml__eot_token_id": 5}, (0, 5, 6)),
    (("y", "z"), {"tokenizer__ggml__eom_token_id": 5}, (0, 5))])
def test_the_tokens_that_end_a_turn_are_known_by_their_texts_too(tmp_path, ends, more, stops):
    """Of most models a file names the end of a sequence alone."""
    write_gguf(tmp_path / "m.gguf", **tokens(*ends), **more)
    assert load_tokenizer(tmp_path / "m.gguf").stop_ids == stops
    found = load_checkpoint(tmp_path / "m.gguf").config["eos_token_id"]
    assert found == (stops[0] if len(stops) == 1 else list(stops))


@pytest.mark.parametrize("changes, rope", [
    ({}, ("default", None)), ({"ARCH__rope__scale_linear": 4.0}, ("linear", 4.0)),
    ({"ARCH__rope__scaling__factor": 4.0}, ("linear", 4.0)), ({"ARCH__rope__scale_linear": 0.0}, ("default", None)),
    ({"ARCH__rope__scaling__factor": 2.0, "ARCH__rope__scale_linear": 4.0}, ("linear", 2.0)),
    ({"ARCH__rope__scaling__factor": 4.0, "ARCH__rope__scaling__type": "none"}, ("default", None))])
def test_a_linear_factor_counts_without_a_type_and_by_its_old_name(tmp_path, changes, rope):
    write_gguf(tmp_path / "m.gguf", **changes)
    found = load_checkpoint(tmp_path / "m.gguf").config["rope_parameters"]
    assert (found["rope_type"], found.get("factor")) == rope


def test_a_template_for_tools_is_found(tmp_path):
    pytest.importorskip("jinja2")
    names = {"tokenizer__chat_templates": ["default", "tool_use"],
             "tokenizer__chat_template__tool_use": "tools: {{ tools[0].name }}"}
    write_gguf(tmp_path / "m.gguf", tokenizer__chat_template="plain", **names)
    found, talk = load_tokenizer(tmp_path / "m.gguf"), [{"role": "user", "content": "a"}]
    assert found.apply_chat_template(talk) == "plain"
    assert found.apply_chat_template(talk, tools=[{"name": "w"}]) == "tools: w"
    write_gguf(tmp_path / "n.gguf", **names)
    assert load_tokenizer(tmp_path / "n.gguf").apply_chat_template(talk, tools=[{"name": "w"}]) == "tools: w"
    write_gguf(tmp_path / "o.gguf", **names | {"tokenizer__chat_template__tool_use": DROP})
    with pytest.raises(CheckpointError, match="tokenizer.chat_template.tool_use"):
        load_tokenizer(tmp_path / "o.gguf")


def test_the_other_byte_order_is_refused(tmp_path):
    """The numbers of its tensors would be others."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_uint32("llama.context_length", 128)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="a GGUF file in this machine's byte order; got the other"):
        load_checkpoint(tmp_path / "m.gguf")
