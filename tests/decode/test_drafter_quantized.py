"""Drafters stored in 8 bits are those of the weights that their scales say."""

import json

import pytest
import torch

from dflash_decode.checkpoint.fields import Fields
from dflash_decode.model.config import read_draft_config
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.quantized import dequantized, read_quantization
from dflash_kernels.testing import same_bits

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.support import tiny  # noqa: E402
from tests.support.decode_models import make_target  # noqa: E402
from tests.support.drafters import Served, draft_config, random_tensors  # noqa: E402

FP8, INT8 = torch.float8_e4m3fn, torch.int8
PACKED = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def grouped(bits=8, **weights):
    return {**PACKED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, **weights}}}}


# name -> (dtype, shape of a scale for (n, k), suffix, quantization_config)
FORMS = {
    "fp8 by tensor": (FP8, lambda n, k: (1,), "_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8 by row": (FP8, lambda n, k: (n, 1), "_scale", grouped(strategy="channel", group_size=None)),
    "fp8 by block": (FP8, lambda n, k: (-(-n // 40), -(-k // 24)), "_scale_inv",
                     {"quant_method": "fp8", "weight_block_size": [40, 24]}),
    "int8 by row": (INT8, lambda n, k: (n,), "_scale", grouped(strategy="channel")),
    "int8 by group": (INT8, lambda n, k: (n, k // 16), "_scale", grouped(strategy="group", group_size=16)),
}


def stored(tensors, form):
    """The tensors of a checkpoint in that form, and what they stand for, in float32 and by another way."""
    kind, shape, suffix, _ = FORMS[form]
    generator, kept, exact = torch.Generator().manual_seed(0), {}, {}
    for name, t in tensors.items():
        if t.dim() != 2:
            kept[name] = exact[name] = t
            continue
        n, k = t.shape
        scale = torch.rand(shape(n, k), generator=generator) * 0.02 + 0.01
        code = torch.randint(-100, 100, (n, k), generator=generator)
        kept[name], kept[name + suffix] = code.to(kind), scale
        kept[name.replace(".weight", ".input_scale")] = torch.ones(1)
        wide = scale.reshape(-1, 1) if scale.dim() == 1 else scale
        rows, columns = (torch.arange(size) * parts // size for size, parts in zip((n, k), wide.shape, strict=True))
        if "block" in form:
            rows, columns = torch.arange(n) // 40, torch.arange(k) // 24
        exact[name] = code.to(kind).float() * wide[rows][:, columns]
    return kept, exact


def drafts(config, tensors, dtype, **options):
    drafter = Drafter(config, tensors, make_target("llama", dtype)[1], **options)
    return Served(drafter, [9, 2]).commit_all().draft([1, 2])


@pytest.mark.parametrize("form", FORMS)
def test_p15_weights_in_8_bits_are_those_of_their_scales(form):
    config, dtype = draft_config({}), torch.bfloat16
    kept, exact = stored(random_tensors(config, torch.float32), form)
    for options in ({}, {"int8": True}):
        got = drafts({**config, "quantization_config": FORMS[form][3]}, kept, dtype, **options)
        want = drafts(config, exact, dtype, **options)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_p15_a_zero_point_is_taken_off():
    config = draft_config({})
    kept, exact = stored(random_tensors(config, torch.float32), "int8 by row")
    for name in [name for name in kept if name.endswith("weight_scale")]:
        weight = name.removesuffix("_scale")
        kept[f"{weight}_zero_point"] = torch.full_like(kept[name], 3).to(torch.int8)
        exact[weight] -= 3 * kept[name].reshape(-1, 1)
    got = drafts({**config, "quantization_config": FORMS["int8 by row"][3]}, kept, torch.float32)[0]
    torch.testing.assert_close(got, drafts(config, exact, torch.float32)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("given", "match"), [
    ({"quant_method": "awq"}, "quantization_config.quant_method must be one of compressed-tensors, .* got 'awq'"),
    ({**grouped(bits=8), "format": "pack-quantized"}, "format = 'pack-quantized', several numbers in one, is not"),
    (grouped(bits=4), "config_groups.group_0.weights.num_bits must be 8; got 4"),
    ({**PACKED, "transform_config": {"a": 1}}, "transform_config, which rotates activations, is not supported"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size .* must be two numbers .* got \\[128\\]"),
    ({**PACKED, "config_groups": {"a": 5}}, "must be a JSON object; got int"),
])
def test_other_formats_are_refused_by_name(given, match):
    with pytest.raises((ValueError, NotImplementedError), match=match):
        read_draft_config({**draft_config({}), "quantization_config": given})


def test_weights_and_scales_that_do_not_fit_are_named():
    config = {**draft_config({}), "quantization_config": FORMS["int8 by row"][3]}
    kept, _ = stored(random_tensors(draft_config({}), torch.float32), "int8 by row")
    target = make_target("llama")[1]
    with pytest.raises(ValueError, match="tensor fc.weight_scale must be there, as fc.weight is stored in 8 bits"):
        Drafter(config, {k: t for k, t in kept.items() if k != "fc.weight_scale"}, target)
    with pytest.raises(ValueError, match=r"scale of fc.weight must be one, one for each of 64 rows, .* got \(7,\)"):
        Drafter(config, {**kept, "fc.weight_scale": torch.ones(7)}, target)
    with pytest.raises(NotImplementedError, match="tensor fc.weight_packed, a weight in 4 bits, is not supported"):
        Drafter(config, {**kept, "fc.weight_packed": torch.ones(7)}, target)
    with pytest.raises(ValueError, match="tensor fc.weight must be one of float32, .* got int8"):  # no config says so
        Drafter(draft_config({}), {k: t for k, t in kept.items() if not k.endswith("_scale")}, target)


def test_p15_an_fp8_drafter_on_disk_loads(tmp_path):
    from dflash_decode import Session

    target, folder = tiny.write_target(tmp_path / "m"), tiny.write_drafter(tmp_path / "d")
    plain = load_file(folder / "model.safetensors")
    kept, exact = stored({name: t.float() for name, t in plain.items()}, "fp8 by row")
    config = json.loads((folder / "config.json").read_text())
    runs = []
    for tensors, more in ((kept, {"quantization_config": FORMS["fp8 by row"][3]}), (exact, {})):
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | more))
        runs.append(Session.load(target, folder, block_size=4).run([[1, 2, 3]], max_tokens=12).answers[0])
    assert (runs[0].tokens, runs[0].steps) == (runs[1].tokens, runs[1].steps)


NVFP4 = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": None,
         "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float",
                                                                          "group_size": 16}}}}
PACKED_NVFP4 = {**grouped(4, type="float", group_size=16), "format": "nvfp4-pack-quantized"}


def in_nvfp4(tensors, modelopt, bits):
    """Random codes for every MLP weight, and what they stand for: (-1)^sign 2^(exponent - 1) (1 + mantissa / 2), below
    which the exponent 0 has 0 and 1/2."""
    generator, kept, exact = torch.Generator().manual_seed(0), dict(tensors), dict(tensors)
    for name in [name for name in tensors if ".mlp." in name]:
        n, k = tensors[name].shape
        bytes_ = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(n, k // 16, generator=generator) + 0.5).to(FP8)
        codes = torch.tensor([[half for byte in row for half in (byte % 16, byte // 16)] for row in bytes_.tolist()])
        exponent, mantissa = codes // 2 % 4, codes % 2
        value = torch.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
        factor = 2.0 ** -5
        exact[name] = torch.where(codes >= 8, -value, value) * scale.float().repeat_interleave(16, 1) * factor
        del kept[name]
        kept[name if modelopt else f"{name}_packed"] = bytes_
        kept[f"{name}_scale"] = scale.view(torch.uint8) if bits else scale
        kept |= {f"{name}_scale_2": torch.tensor(factor), name.replace("weight", "input_scale"): torch.ones(1)} \
            if modelopt else {f"{name}_global_scale": torch.tensor([1 / factor])}
    return kept, exact


@pytest.mark.parametrize(("modelopt", "bits"), [(True, False), (True, True), (False, False)])
def test_p15_weights_in_nvfp4_are_what_their_bits_say(modelopt, bits):
    """ModelOpt's second scale is a factor, compressed-tensors' a divisor; scales can be stored as bytes."""
    config = draft_config({})
    kept, exact = in_nvfp4(random_tensors(config, torch.float32), modelopt, bits)
    got = drafts({**config, "quantization_config": NVFP4 if modelopt else PACKED_NVFP4}, kept, torch.float32)
    want = drafts(config, exact, torch.float32)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


class Unread(dict):
    def __getitem__(self, name):
        raise AssertionError(f"{name} was read")

    def items(self):
        raise AssertionError("all were read")


@pytest.mark.parametrize("config", [NVFP4, PACKED_NVFP4, FORMS["fp8 by row"][3]])
def test_a_weight_is_read_when_it_is_asked_for(config):
    """A target's weights can be larger than memory, and come from the files one at a time."""
    names = ("a.weight", "b.weight_packed") if config is PACKED_NVFP4 else ("a.weight", "b.weight")
    ends = ("_global_scale", "_scale") if config is PACKED_NVFP4 else ("_scale_2", "_scale") if config is NVFP4 else (
        "_scale",)
    stored = Unread.fromkeys([*names, *(f"{name}.weight{end}" for name in "ab" for end in ends)])
    found = dequantized(read_quantization(Fields("x", {"quantization_config": config})), stored, torch.float32, "x")
    assert {*found} == {"a.weight", "b.weight"} and len(found) == 2


@pytest.mark.parametrize("first", ["nvfp4", "fp8"])
def test_groups_in_nvfp4_and_fp8_each_have_their_scales(first):
    w, scale = torch.randn(256, 256).to(FP8), torch.rand(2, 2)
    groups = {"nvfp4": {"format": "nvfp4-pack-quantized", "weights": {"num_bits": 4, "group_size": 16}},
              "fp8": {"format": "float-quantized", "weights": {"num_bits": 8, "block_structure": [128, 128]}}}
    order = sorted(groups, key=lambda name: name != first)
    config = read_quantization(Fields("x", {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "mixed-precision",
        "config_groups": {name: groups[name] for name in order}}}))
    found = dequantized(config, {"w": w, "w_scale": scale}, torch.float32, "x")["w"]
    assert torch.equal(found, w.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1))


def test_nvfp4_that_does_not_fit_is_named():
    config, target = {**draft_config({}), "quantization_config": NVFP4}, make_target("llama")[1]
    kept, _ = in_nvfp4(random_tensors(draft_config({}), torch.float32), True, False)
    name = "layers.0.mlp.up_proj.weight"
    for wrong, match in (({f"{name}_scale": kept[f"{name}_scale"][:, :3]}, r"up_proj.weight in NVFP4 must be .* got "
                          r"uint8 \(96, 32\), float8_e4m3fn \(96, 3\), float32 \(\)"),
                         ({f"{name}_scale_2": torch.ones(2)}, r"in NVFP4 must be .* float32 \(2,\)")):
        with pytest.raises(ValueError, match=match):
            Drafter(config, {**kept, **wrong}, target)
    with pytest.raises(ValueError, match="group_size must be 16 in NVFP4; got 32"):
        read_draft_config({**config, "quantization_config": {**NVFP4, "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}})
    with pytest.raises(NotImplementedError, match="quant_algo must be one of FP8, NVFP4, W4A16_NVFP4; got 'INT4_AWQ'"):
        read_draft_config({**config, "quantization_config": {**NVFP4, "quant_algo": "INT4_AWQ"}})


def test_scales_in_uint8_are_exponents():
    """MXFP8: a power of two for 32 columns."""
    w, exponents = torch.randn(4, 64).to(FP8), torch.randint(100, 140, (4, 2), dtype=torch.uint8)
    config = read_quantization(Fields("x", {"quantization_config": grouped(strategy="group", group_size=32)}))
    found = dequantized(config, {"w": w, "w_scale": exponents}, torch.float32, "x")["w"]
    assert torch.equal(found, w.float() * (2.0 ** (exponents.double() - 127)).float().repeat_interleave(32, 1))
    with pytest.raises(ValueError, match="the scale of w must be of floating point, or exponents .*; got torch.int32"):
        dequantized(config, {"w": w, "w_scale": exponents.int()}, torch.float32, "x")["w"]
