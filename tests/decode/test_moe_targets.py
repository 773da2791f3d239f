"""Targets with experts in our own layers. What they compute is compared with transformers where the other families are;
here: no bit depends on how tokens are cut into passes, and every form of a published checkpoint gives the same bits."""

import math
import weakref
from collections.abc import Mapping

import pytest
import torch

from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.loop import Decoder
from dflash_decode.measure import measure
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.native import NativeTarget
from dflash_decode.model.target_config import read_target_config
from dflash_decode.packed import VerifyStage
from dflash_kernels import expert_mlp
from dflash_kernels.testing import every_isa, same_bits, use_isa
from tests.support.decode_runs import Oracle, requests, run

pytest.importorskip("transformers")
from tests.decode.test_decode_target import forward  # noqa: E402
from tests.support.decode_models import EXPERTS, VOCAB, make_target  # noqa: E402

E4M3 = torch.float8_e4m3fn


def rows_of(target, tokens=20):
    ids = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(3))
    return torch.cat(forward(target, ids, (0, 2), [tokens]), 1)


def widths_agree(target, widths):
    ids = torch.randint(0, VOCAB, (16,), generator=torch.Generator().manual_seed(0))
    alone = torch.cat(forward(target, ids, (0, 3), [1] * 16), 1)
    for width in widths:
        found = forward(target, ids, (0, 3), [width] * (16 // width) + [16 % width] * (16 % width > 0))
        assert same_bits(torch.cat(found, 1), alone), width


@pytest.mark.parametrize("family", EXPERTS)
def test_no_width_of_a_pass_changes_a_bit(family):
    widths_agree(make_target(family, torch.bfloat16)[1], range(2, 17))


@pytest.mark.parametrize("isa", [isa for isa in ("avx2", "avx512") if isa in every_isa()])
def test_no_width_changes_a_bit_on_other_instruction_sets(isa):
    with use_isa(isa):
        widths_agree(make_target("minimax-m2", torch.bfloat16)[1], (3, 8, 16))


@pytest.mark.parametrize("family", EXPERTS)
def test_speculative_text_is_baseline_text(family):
    _, target = make_target(family, torch.bfloat16)
    baseline = run(target, None, requests(), max_context=80)
    texts = {key: value[0] for key, value in baseline.items()}
    assert len(set(map(tuple, texts.values()))) > 6
    for drafter, batch in ((Drafter.random(target, num_layers=2, block_size=5), 3),
                           (Oracle.knowing(target, texts, 0.3, block_size=16), 8)):
        got = run(target, drafter, requests(), max_batch=batch, max_context=80)
        assert {key: value[:2] for key, value in got.items()} == {key: value[:2] for key, value in baseline.items()}


@pytest.mark.parametrize("family", EXPERTS)
def test_the_published_form_of_a_checkpoint_is_the_same_model(family, tmp_path):
    """transformers writes each expert's tensors apart, as they were published, and has one tensor for all."""
    model, target = make_target(family, torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = load_checkpoint(tmp_path)
    assert ("experts.0." in " ".join(found.tensors)) == (family != "gpt-oss")
    assert same_bits(rows_of(NativeTarget(found.config, found.tensors)), rows_of(target))


def test_weights_in_8_bit_blocks_are_those_that_their_scales_say():
    """MiniMax-M2's form: every product's weight but the router and the head."""
    model, _ = make_target("minimax-m2", torch.bfloat16)
    stored, exact = {}, {}
    for name, t in published(model.state_dict()).items():
        stored[name] = exact[name] = t
        if t.dim() == 2 and not any(part in name for part in ("embed", "lm_head", "gate.weight")):
            scale = torch.rand(-(-t.shape[0] // 32), -(-t.shape[1] // 16)) + 0.5
            stored[name], stored[f"{name}_scale_inv"] = t.to(E4M3), scale
            rows, columns = torch.arange(t.shape[0]) // 32, torch.arange(t.shape[1]) // 16
            exact[name] = (t.to(E4M3).float() * scale[rows][:, columns]).bfloat16()
    config = {**model.config.to_dict(), "quantization_config": {
        "quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [32, 16], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}}
    assert len(stored) > len(exact) + 200
    got, want = NativeTarget(config, stored), NativeTarget(model.config.to_dict(), exact)
    assert same_bits(rows_of(got), rows_of(want))
    name = next(name for name in stored if name.endswith("w2.weight"))
    with pytest.raises(ValueError, match=f"tensor {name}_scale must be there, as {name} is stored in 8 bits; got noth"):
        NativeTarget(config, {key: t for key, t in stored.items() if key != f"{name}_scale_inv"})


def published(state):
    """MiniMax-M2's names: of each expert's tensors, in a block of another name."""
    made = {}
    for name, t in state.items():
        at, found, part = name.partition(".mlp.")
        new = f"{at}.block_sparse_moe.{part}" if found else name
        if part == "experts.gate_up_proj":
            for e, both in enumerate(t):
                made[f"{new[:-12]}{e}.w1.weight"], made[f"{new[:-12]}{e}.w3.weight"] = both.chunk(2)
        elif part == "experts.down_proj":
            made |= {f"{new[:-9]}{e}.w2.weight": one for e, one in enumerate(t)}
        else:
            made[new] = t
    return made


def test_weights_in_mxfp4_are_those_of_transformers_own_reading():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model, _ = make_target("gpt-oss", torch.bfloat16)
    state, stored, generator = model.state_dict(), {}, torch.Generator().manual_seed(0)
    for name in list(state):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, k, n = state[name].shape
            k = 64 if name.endswith("gate_up_proj") else 96  # a multiple of 32
            codes = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8, generator=generator)
            powers = torch.randint(120, 126, (experts, n, k // 32), dtype=torch.uint8, generator=generator)
            stored |= {f"{name}_blocks": codes, f"{name}_scales": powers}
            state[name] = convert_moe_packed_tensors(codes, powers, dtype=torch.bfloat16)
        else:
            stored[name] = state[name]
    for tensors in (state, stored):  # wider experts, for whole groups of 32
        for name in [name for name in tensors if name.endswith("gate_up_proj_bias")]:
            tensors[name] = torch.randn(8, 2 * 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    for name in [name for name in stored if "gate_up_proj_" in name and "bias" not in name]:
        stored[name] = torch.cat((stored[name], stored[name].flip(1)), 1)
    for name in [name for name in state if name.endswith("gate_up_proj")]:
        state[name] = torch.cat((state[name], state[name].flip(2)), 2)
    config = {**model.config.to_dict(), "intermediate_size": 96}
    four = {**config, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    assert same_bits(rows_of(NativeTarget(four, stored)), rows_of(NativeTarget(config, state)))


@pytest.mark.parametrize("family", ["minimax-m2", "gpt-oss"])
def test_in_8_bits_no_width_changes_a_bit(family):
    model, whole = make_target(family, torch.bfloat16)
    eight = NativeTarget(model.config.to_dict(), model.state_dict(), int8=True)
    widths_agree(eight, (5, 16))
    assert 0.95 < torch.cosine_similarity(rows_of(eight).flatten().float(), rows_of(whole).flatten().float(), 0) < 1


def test_what_a_pass_costs_is_measured_over_tokens_that_choose_other_experts(monkeypatch):
    """Rows of one token would read the experts of a single row."""
    _, target = make_target("minimax-m2", torch.bfloat16)
    decoder, seen = Decoder(target, Drafter.random(target, num_layers=1, block_size=4), max_batch=2, max_context=64), {}

    def run(stage):
        seen[stage.rows] = stage.ids.tensor.tolist()

    monkeypatch.setattr(VerifyStage, "__call__", run)
    measure(decoder.runner, few=False)
    assert sorted(seen) == [*range(1, 9), 12, 16] and all(len(set(ids)) == rows for rows, ids in seen.items())


class Read(Mapping):
    """Tensors that are made when they are read; `alive` of them are, and `most` were at a time."""

    def __init__(self, tensors):
        self.tensors, self.reads, self.alive, self.most = tensors, {}, 0, 0

    def __getitem__(self, name):
        made = self.tensors[name].clone()
        self.reads[name] = self.reads.get(name, 0) + 1
        if "experts" in name:
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(made, self._gone)
        return made

    def _gone(self):
        self.alive -= 1

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_experts_are_read_once_and_one_at_a_time():
    """A checkpoint in memory maps is never in memory twice."""
    model, target = make_target("minimax-m2", torch.bfloat16)
    tensors = Read(published(model.state_dict()))
    same = NativeTarget(model.config.to_dict(), tensors, dtype=torch.bfloat16)
    assert set(tensors.reads.values()) == {1} and set(tensors.reads) == set(tensors.tensors)
    assert tensors.most <= 5  # the first, which tells all shapes, and gate and up of another, on the way into one
    assert same_bits(rows_of(same), rows_of(target))


@pytest.mark.parametrize(("family", "change", "match"), [
    ("minimax-m2", ("block_sparse_moe.gate.weight", lambda t: t[1:]),
     r"layers.0.block_sparse_moe.gate.weight must have shape \(16, 64\); got \(15, 64\)"),
    ("minimax-m2", ("experts.13.w3.weight", None),
     r"layers.0.block_sparse_moe.experts.13.w3.weight must be there with shape \(48, 64\); got nothing"),
    ("minimax-m2", ("experts.13.w2.weight", lambda t: t[:, 1:]),
     r"layers.0.block_sparse_moe.experts.13.w2.weight must have shape \(64, 48\); got \(64, 47\)"),
    ("minimax-m2", ("block_sparse_moe.e_score_correction_bias", None), "e_score_correction_bias must be there"),
    ("minimax-m2", ("self_attn.q_norm.weight", lambda t: t[:32]), r"q_norm.weight must have shape \(128,\); got \(32,"),
    ("gpt-oss", ("mlp.experts.gate_up_proj", None), r"gate_up_proj must be there with shape \(8, 64, 96\); got no"),
    ("gpt-oss", ("mlp.experts.gate_up_proj", lambda t: t[1:]), r"\(8, 64, 96\); got \(7, 64, 96\)"),
    ("gpt-oss", ("self_attn.sinks", None), "self_attn.sinks must be there"),
])
def test_tensors_that_do_not_fit_are_named(family, change, match):
    model, _ = make_target(family)
    tensors = published(model.state_dict()) if family == "minimax-m2" else model.state_dict()
    end, new = change
    name = next(name for name in tensors if name.endswith(end))
    tensors = {key: t for key, t in tensors.items() if key != name} | ({name: new(tensors[name])} if new else {})
    with pytest.raises(ValueError, match=match):
        NativeTarget(model.config.to_dict(), tensors)


def test_more_experts_than_the_config_has_are_an_error():
    model, _ = make_target("minimax-m2")
    tensors = published(model.state_dict())
    name = "model.layers.0.block_sparse_moe.experts.16.w1.weight"
    with pytest.raises(ValueError, match=f"tensor {name} must not be there"):
        NativeTarget(model.config.to_dict(), tensors | {name: torch.zeros(48, 64)})


def test_layers_that_predict_further_tokens_are_left_out():
    model, target = make_target("minimax-m2", torch.bfloat16)
    tensors = model.state_dict() | {"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}
    same = NativeTarget(model.config.to_dict() | {"num_mtp_modules": 3}, tensors)
    assert same_bits(rows_of(same), rows_of(target))


def test_an_expert_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("DFLASH_CHECK", "1")
    _, target = make_target("minimax-m2")
    experts = target._layers[0].mlp
    ids = torch.tensor([[0, 16, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match="ids must be between -1 and 15, of 16 experts; got 16"):
        expert_mlp(torch.zeros(1, 64), experts.gate_up, experts.down, ids, torch.ones(1, 3))


@pytest.mark.parametrize(("family", "changes", "error", "match"), [
    ("minimax-m2", {"scoring_func": "softmax"}, NotImplementedError, "scoring_func must be 'sigmoid'; got 'softmax'"),
    ("minimax-m2", {"use_qk_norm": False}, NotImplementedError, "use_qk_norm = False changes the model"),
    ("minimax-m2", {"attn_type_list": [1, 0, 1, 1]}, NotImplementedError, "attn_type_list = "),
    ("minimax-m2", {"shared_intermediate_size": 8}, NotImplementedError, "shared_intermediate_size = 8"),
    ("minimax-m2", {"num_experts_per_tok": 17}, ValueError, "num_experts_per_tok must be an integer of at most 16"),
    ("minimax-m2", {"num_local_experts": None}, ValueError, "num_local_experts must be an integer of at least 1"),
    ("minimax-m2", {"rope_parameters": None}, ValueError, "rope_theta must be a number above 1; got nothing"),
    ("minimax-m2", {"rms_norm_eps": None}, ValueError, "rms_norm_eps must be a number above 0 .*; got nothing"),
    ("gpt-oss", {"swiglu_limit": 5.0}, NotImplementedError, "swiglu_limit = 5.0 changes the model"),
    ("gpt-oss", {"quantization_config": {"quant_method": "gptq"}}, NotImplementedError, "quant_method must be one of"),
    ("qwen3-moe", {"quantization_config": {"quant_method": "mxfp4"}}, NotImplementedError, "quant_method must be one"),
    ("glm4-moe", {"topk_group": 5}, ValueError, "topk_group must be an integer of at most 4; got 5"),
])
def test_fields_that_are_not_supported_are_named(family, changes, error, match):
    model, _ = make_target(family)
    with pytest.raises(error, match=match):
        NativeTarget(model.config.to_dict() | changes, model.state_dict())


@pytest.mark.parametrize(("family", "names"), [
    ("minimax-m2", ("num_local_experts", "num_experts_per_tok", "intermediate_size")),
    ("qwen3-moe", ("moe_intermediate_size", "decoder_sparse_step")),
    ("glm4-moe", ("n_routed_experts", "moe_intermediate_size", "n_group", "topk_group", "routed_scaling_factor")),
])
def test_every_number_is_refused_out_of_its_range(family, names):
    config = make_target(family)[0].config.to_dict()
    read_target_config(config)
    for name in names:
        whole = () if name == "routed_scaling_factor" else (2**31, 1.5)
        for value in (0, -1, -0.5, True, "1", [], {}, math.nan, math.inf, 10**400, 1e39, *whole):
            with pytest.raises(ValueError, match=f"^target config: {name} must be .*; got "):
                read_target_config(config | {name: value})
