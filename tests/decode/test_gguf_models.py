"""Models of every architecture in GGUF files: float32 text equals that of transformers' model of the same weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from dflash_decode.checkpoint import CheckpointError, load_checkpoint  # noqa: E402
from dflash_decode.model.hf import HFTarget  # noqa: E402
from dflash_decode.model.native import NativeTarget  # noqa: E402
from dflash_decode.session import Session  # noqa: E402
from tests.support.decode_models import COMMON, LLAMA3, YARN, baseline_text, randomise  # noqa: E402
from tests.support.gguf_models import write_model  # noqa: E402

EXPERTS = {"num_experts_per_tok": 2, "head_dim": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 64}
# Name -> architecture of the file, transformers' class, config, whether our own layers run it.
KINDS = {
    "llama": ("llama", "Llama", {}, True),
    "llama-linear": ("llama", "Llama", {"head_dim": 32, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, True),
    "llama-3.1": ("llama", "Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, True),
    "llama-biased": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}, True),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}, True),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32, "rope_parameters": YARN}, True),
    "smollm3": ("smollm3", "SmolLM3", {"tie_word_embeddings": True}, True),
    "qwen3moe": ("qwen3moe", "Qwen3Moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 48,
                                          "norm_topk_prob": True}, True),
    "gemma3": ("gemma3", "Gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
                                    "num_hidden_layers": 7, "tie_word_embeddings": True, "rope_parameters": {
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                                        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}},
               False),
    "phi3": ("phi3", "Phi3", {"sliding_window": 24}, False),
    "phi3-long": ("phi3", "Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}, False),
    "gpt-oss": ("gpt-oss", "GptOss", {**EXPERTS, "num_local_experts": 4, "sliding_window": 16}, True),
}
PROMPT = list(range(1, 40))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


def make(kind):
    arch, name, changes, _ = KINDS[kind]
    torch.manual_seed(0)
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**COMMON, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(model)
    return arch, model


@pytest.mark.parametrize("kind", KINDS)
def test_text_equals_transformers(tmp_path, kind):
    arch, model = make(kind)
    write_model(tmp_path / "m.gguf", model, arch)
    want = baseline_text(model, PROMPT, 24)
    session = Session.load(tmp_path / "m.gguf", "random", dtype="float32", block_size=4)
    for speculative in (False, True):
        found = session.run([PROMPT], max_tokens=24, speculative=speculative).answers[0].tokens
        assert found == want[:len(found)] and (len(found) == 24 or found[-1] == 0)
    assert isinstance(session.target, NativeTarget if KINDS[kind][3] else HFTarget)
    assert session.weights == "model"


@pytest.mark.parametrize(("kind", "changes", "message"), [
    ("qwen3moe", {"ARCH__expert_count": "x"}, "qwen3moe.expert_count must be an integer of at least 1; got 'x'"),
    ("gemma3", {"ARCH__attention__sliding_window_pattern": [1, 0]}, "window_pattern must be a list of 7 layers"),
    ("gpt-oss", {"ARCH__rope__scaling__type": "longrope"}, "a tensor rope_factors_long.weight for .* got none"),
    ("llama-3.1", {"ARCH__rope__dimension_count": 8}, "rope_freqs.weight must have 4 factors above 0 in F32; got 8"),
    ("llama-3.1", {"ARCH__rope__scaling__type": "yarn"}, "none or longrope beside rope_freqs.weight; got 'yarn'"),
    ("llama", {"ARCH__expert_count": 8}, "0 .a dense model; a mixture of experts runs from its directory of safetens"),
])
def test_metadata_that_do_not_fit_are_refused(tmp_path, kind, changes, message):
    arch, model = make(kind)
    write_model(tmp_path / "m.gguf", model, arch, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(("kind", "name", "message"), [
    ("gpt-oss", "model.layers.1.mlp.experts.down_proj_bias", "experts of a gpt_oss model must fit together; got"),
    ("gpt-oss", "model.layers.1.self_attn.q_proj.bias", "q_proj.bias must be there with shape .128,.; got nothing"),
    ("gemma3", "model.layers.1.mlp.up_proj.weight", "expected a tensor blk.1.ffn_up.weight; got none"),
])
def test_a_missing_tensor_is_named(tmp_path, kind, name, message):
    """transformers would make it of random numbers, and warn."""
    arch, model = make(kind)
    state = model.state_dict()
    model.state_dict = lambda: {n: t for n, t in state.items() if n != name}
    write_model(tmp_path / "m.gguf", model, arch)
    with pytest.raises(CheckpointError, match=message):
        Session.load(tmp_path / "m.gguf", None)


@pytest.mark.parametrize("weights", ["file", "exact", "int8"])
def test_transformers_layers_need_weights_in_elements(tmp_path, weights):
    arch, model = make("phi3")
    write_model(tmp_path / "m.gguf", model, arch)
    with pytest.raises(CheckpointError, match="need a model_type of cwm, glm4_moe, .*; got 'phi3'"):
        Session.load(tmp_path / "m.gguf", None, weights=weights)
    with pytest.raises(CheckpointError, match="native layers need a model_type of cwm, glm4_moe, .*; got 'phi3'"):
        Session.load(tmp_path / "m.gguf", None, native=True)
