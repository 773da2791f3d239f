"""Models with recurrent or convolution states as targets: a rejected draft enters no state, and a step is one pass."""

import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dflash_decode.loop import Decoder  # noqa: E402
from dflash_decode.model.drafter import Drafter  # noqa: E402
from dflash_decode.model.hf import HFTarget, refuse_model  # noqa: E402
from dflash_decode.model.hf_states import UNBOUNDED, _fresh, _Mixer, mixers  # noqa: E402
from dflash_decode.requests import Request  # noqa: E402
from dflash_decode.session import Session  # noqa: E402
from dflash_kernels.testing import same_bits  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.decode_models import COMMON, VOCAB, randomise  # noqa: E402
from tests.support.decode_runs import Oracle, run  # noqa: E402
from tests.support.drafters import draft_config, random_tensors  # noqa: E402

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
CONV = ["conv", "full_attention", "conv", "full_attention"]
HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_d_state": 16}
KINDS = {
    "bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("FalconH1", {**MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 64, "head_dim": 16}),
    "granitemoehybrid": ("GraniteMoeHybrid", {
        **MAMBA, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 32}),
    "jamba": ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_dt_rank": 8}),
    "lfm2": ("Lfm2", {"layer_types": CONV}),
    "lfm2_moe": ("Lfm2Moe", {"layer_types": CONV, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1,
                             "moe_intermediate_size": 32}),
    "lfm3": ("Lfm3", {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"], "sliding_window": 8}),
    "nemotron_h": ("NemotronH", {
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16,
        "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "head_dim": 16}),
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, "layer_types": ["linear_attention", "full_attention"] * 2}),
    "qwen3_5": ("Qwen3_5", {**DELTA, "head_dim": 32}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**DELTA, **EXPERTS, "head_dim": 32}),
    "qwen3_next": ("Qwen3Next", {**DELTA, **EXPERTS, "head_dim": 32}),
    "zamba": ("Zamba", {**HYBRID, "n_mamba_heads": 2, "mamba_dt_rank": 8}),
    "zamba2": ("Zamba2", {**HYBRID, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16, "use_mem_rope": True,
                          "num_mem_blocks": 2, "num_key_value_heads": 4}),
}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
SHORT = {"head_dim": 16, "swa_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ELSEWHERE = "keeps state other than keys and values that is not in transformers' cache"
REFUSED = {
    "bailing_hybrid": ("BailingHybrid", {**LATENT, "n_group": 2, "topk_group": 1}, "keeps latent vectors, not keys"),
    "deepseek_v4": ("DeepseekV4", {}, "has layers of a kind that is not supported, compressed_sparse_attention"),
    "falcon_mamba": ("FalconMamba", {}, "has no layer that attends, and so no pages"),
    "inkling": ("InklingText", SHORT, "has layers of a kind that is not supported, hybrid_sliding"),
    "inkling2": ("Inkling2Text", SHORT, "has layers of a kind that is not supported, hybrid_sliding"),
    "kimi_linear": ("KimiLinear", LATENT, "keeps latent vectors, not keys and values"),
    "mamba": ("Mamba", {}, "has no layer that attends, and so no pages"),
    "mamba2": ("Mamba2", {"num_heads": 4, "head_dim": 32, "n_groups": 1}, "has no layer that attends"),
    "minimax": ("MiniMax", {"head_dim": 16}, _ELSEWHERE),
    "qwen4_exp": ("Qwen4ExpText", {
        **DELTA, **EXPERTS, "head_dim": 32, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32,
        "indexer_budget": 16, "indexer_compress_ratio": 4}, "has layers of a kind that is not supported, indexed_att"),
    "recurrent_gemma": ("RecurrentGemma", {"lru_width": 64}, _ELSEWHERE),
    "rwkv": ("Rwkv", {}, "does not use transformers' attention interface"),
    "xlstm": ("xLSTM", {}, _ELSEWHERE),
}
# Multimodal models: their text model is of another family, or is not offered alone.
WITHIN = {"glm5_next", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron3_5_transcribe", "nemotron_h_omni"}
PROMPTS = [[5], list(range(1, 40)), [7] * 17]


def made(name, changes, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        config = getattr(transformers, f"{name}Config")(**{**COMMON, **changes})
        return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


def make(kind, floor=False):
    """floor: with what transformers puts under some time steps. Its own text then depends on how tokens are cut."""
    name, changes = KINDS[kind]
    model = made(f"{name}Text" if name.startswith("Qwen3_5") else name, changes)
    randomise(model)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("A_log"):  # a state that neither vanishes nor grows
            parameter.data = torch.rand_like(parameter)
    for module in () if floor else model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = UNBOUNDED
    return model


def asked(n):
    return [Request(i, prompt, n) for i, prompt in enumerate(PROMPTS)]


def generated(model):
    return {i: model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt):].tolist()
            for i, prompt in enumerate(PROMPTS)}


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_generate_with_and_without_drafts(kind):
    model = make(kind)
    want = generated(model)
    target = HFTarget(model)
    assert {i: got[0] for i, got in run(target, None, asked(16), max_batch=3, max_context=64).items()} == want
    oracle = Oracle.knowing(target, want, 0.3, block_size=5)
    got = run(target, oracle, asked(16), max_batch=2, max_context=64)
    assert {i: text for i, (text, *_) in got.items()} == want
    assert {1, 5} < {length for *_, lengths in got.values() for length in lengths}


@pytest.mark.parametrize("kind", ["lfm2", "nemotron_h"])
def test_a_dspark_drafter_as_published_for_it(kind):
    """Rotary pairs side by side, a Markov head, and an anchor that drafts."""
    model = make(kind)
    want = generated(model)
    config = draft_config({"architectures": ["Lfm2DSparkDraftModel"], "markov_rank": 8, "rope_is_neox_style": False})
    target = HFTarget(model)
    drafter = Drafter(config, random_tensors(config, torch.float32), target)
    got = run(target, drafter, asked(16), max_batch=2, max_context=64)
    assert {i: text for i, (text, *_) in got.items()} == want


def test_a_directory_loads(tmp_path):
    model, folder = make("qwen3_next"), tiny.write_target(tmp_path)
    want = model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=12, do_sample=False)[0, len(PROMPTS[1]):].tolist()
    model.save_pretrained(folder)
    session = Session.load(folder, "random", dtype="float32", block_size=4)
    assert session.run([PROMPTS[1]], max_tokens=12).answers[0].tokens == want


def test_a_step_is_one_pass_of_the_model():
    target = HFTarget(make("qwen3_next"))
    calls = []
    target.base.register_forward_hook(lambda *_: calls.append(1))
    got = run(target, Oracle.knowing(target, {0: [0] * 9}, 1.0, block_size=4), [Request(0, [3] * 20, 9)],
              max_batch=1, max_context=64)
    assert len(calls) == 2 + len(got[0][2])  # a prompt of 16 + 4 tokens


def passes(target):
    """run(context, ids) on one page table, and the caches."""
    caches, table = target.cache.allocate(4, 16), torch.tensor([[2, 0]], dtype=torch.int32)

    def forward(context, ids):
        positions = context + torch.arange(len(ids))[None]
        slots = table[0].long()[positions // 16] * 16 + positions % 16
        lens = [torch.tensor([n], dtype=torch.int32) for n in (context, len(ids))]
        return target.make_pass(1, len(ids), caches).run(torch.tensor([ids]), positions, slots, table, *lens)[0]

    return forward


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_5"])
def test_a_pass_again_and_a_pass_after_other_drafts_are_the_same(kind, monkeypatch):
    target = HFTarget(make(kind))
    forward, prompt, block = passes(target), list(range(10)), [20, 21, 22, 23]
    forward(0, prompt)
    once = forward(10, block)
    assert same_bits(forward(10, block), once)  # an interrupt can come between a pass and what it commits
    forward(10, [20, 21, 50, 60])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # or at the end of a pass
        patched.setattr(target.states, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        forward(12, block[2:])
    torch.testing.assert_close(forward(12, block[2:]), once[2:], atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="states must be of the 20 tokens before the block; got 12 to 14"):
        forward(20, block)


def test_mixers_that_begin_anew_run_token_by_token():
    """Seen in transformers: Mamba-1 loses its state where several tokens follow it."""
    found = {}
    for kind in ("jamba", "lfm2", "qwen3_5"):
        model = make(kind)
        HFTarget(model)
        found[kind] = {module.forward.continues for module in mixers(model)}
    assert found == {"jamba": {False}, "lfm2": {True}, "qwen3_5": {True}}


def test_mixers_of_other_forms_are_named():
    with pytest.raises(NotImplementedError, match="ZayaCCAProjection must return hidden states alone.*; got a tuple"):
        HFTarget(made("Zaya", {"head_dim": 16}))
    with pytest.raises(NotImplementedError, match="InklingShortConvolution must take hidden states alone.*; got Given"):
        HFTarget(made("InklingText", {**SHORT, "layer_types": ["hybrid"] * 4}))


@torch.inference_mode()
def forms_apart(model):
    """How far a mixer's output for tokens one by one is from that for all at once, at most."""
    config, most = model.config.get_text_config(), 0.0
    for module in mixers(model):
        mixer = module.forward if isinstance(module.forward, _Mixer) else _Mixer(module)
        inputs = torch.randn(1, 24, config.hidden_size, generator=torch.Generator().manual_seed(1))
        alone, together = (_fresh(config)[module.layer_idx] for _ in range(2))
        want, got = mixer._run(inputs, together), [mixer._run(part, alone) for part in inputs.split(1, 1)]
        most = max(most, float((torch.cat(got, 1) - want).abs().max() / want.abs().max()))
    return most


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_leave_the_state_of_all_at_once(kind):
    assert forms_apart(make(kind)) < 1e-5


@pytest.mark.parametrize("kind", ["nemotron_h", "zamba2"])
def test_a_floor_that_only_several_tokens_have_is_removed(kind):
    model = make(kind, floor=True)
    assert forms_apart(model) > 1e-3
    HFTarget(model)
    assert forms_apart(model) < 1e-5


def test_bounds_of_time_steps_that_a_config_asks_for_are_refused():
    with pytest.raises(NotImplementedError, match=r"time_step_limit of a BambaForCausalLM must be \(0.0, inf\), as "
                                                  r"transformers bounds .*; got \(0.0, 0.1\)"):
        HFTarget(made("Bamba", KINDS["bamba"][1] | {"time_step_limit": (0.0, 0.1)}))


@pytest.mark.parametrize("kind", REFUSED)
def test_states_that_are_not_supported_are_refused_in_one_sentence(kind):
    name, changes, words = REFUSED[kind]
    with pytest.raises(NotImplementedError, match=rf"^HFTarget: {name.removesuffix('Text')}ForCausalLM {words}") as got:
        refuse_model(made(name, changes, "meta"))
    assert "\n" not in str(got.value)


def test_every_family_of_transformers_with_a_state_is_among_these():
    """A new one must be tried before it is a target."""
    folder = Path(transformers.__file__).parent / "models"
    keeps = re.compile(r"update_conv_state\(|_is_stateful = True|class MiniMaxCache")
    found = {file.parent.name for file in folder.glob("*/modeling_*.py") if keeps.search(file.read_text("utf-8"))}
    assert found == {*KINDS, *REFUSED, *WITHIN, "zaya"}


def test_outside_of_the_target_mixers_are_transformers_own():
    model, ids = make("lfm2"), torch.randint(0, VOCAB, (1, 12))
    with torch.no_grad():
        want = model(ids).logits
        HFTarget(model)
        HFTarget(model).model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(ids).logits, want)


def test_pages_are_those_of_layers_that_attend():
    target = HFTarget(make("lfm2"))
    assert (target.num_layers, target.cache.layers) == (4, 2)
    assert Decoder(target, max_batch=1, max_context=32).kv[0][1].k.shape[0] > 0
