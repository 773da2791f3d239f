"""Any transformers model through our pages: speculative text equals baseline text, and baseline text is transformers'
own."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dflash_decode.checkpoint import CheckpointError  # noqa: E402
from dflash_decode.loop import Decoder  # noqa: E402
from dflash_decode.lossless import first_difference  # noqa: E402
from dflash_decode.model.drafter import Drafter  # noqa: E402
from dflash_decode.model.hf import HFTarget  # noqa: E402
from dflash_decode.requests import Request  # noqa: E402
from dflash_decode.session import Session  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.decode_models import COMMON, VOCAB, baseline_text, randomise  # noqa: E402

KINDS = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "minimax_m2": ("MiniMaxM2", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16,
                                 "intermediate_size": 48}),
    "cohere2": ("Cohere2", {"sliding_window": 16}),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gpt_oss": ("GptOss", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
}


def make(kind, dtype=torch.float32):
    name, changes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(model)
    return model.to(dtype)


def texts(decoder, prompts, n):
    out = {i: [] for i in range(len(prompts))}
    for event in decoder.stream(Request(i, p, n) for i, p in enumerate(prompts)):
        assert event.error is None, event.error
        out[event.id] += event.tokens
    return [out[i] for i in range(len(prompts))]


PROMPTS = [[5, 9, 33], list(range(1, 40)), [7] * 17]


def test_layers_between_the_model_and_its_logits_are_seen():
    """Whose output embeddings are not all of them."""
    config = transformers.ModernBertDecoderConfig(**{k: v for k, v in COMMON.items() if v is not None},
                                                  **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0))
    with pytest.raises(NotImplementedError, match="logits of ModernBertDecoderForCausalLM must be the output embedd"):
        HFTarget(transformers.ModernBertDecoderForCausalLM(config).eval())
    model = make("llama")
    assert HFTarget(model).head.shape == HFTarget(model).head.shape  # again, with our attention in it


def test_a_longrope_ends_where_its_factors_change():
    """For a call that reaches further transformers takes others, and a prompt comes in several calls."""
    lengths = {}
    for short in (1.0, 4.0):
        longrope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 8, "short_factor": [short] * 8,
                    "original_max_position_embeddings": 32}
        config = transformers.Phi3Config(**COMMON | {
            "max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_parameters": longrope})
        lengths[short] = HFTarget(transformers.Phi3ForCausalLM(config).eval()).max_context
    assert lengths == {1.0: 32, 4.0: 128}


@pytest.mark.parametrize("kind", KINDS)
def test_speculative_equals_baseline_equals_transformers_in_float32(kind):
    model = make(kind)
    want = [baseline_text(model, p, 20) for p in PROMPTS]
    target = HFTarget(model)
    drafter = Drafter.random(target, num_layers=2, block_size=5)
    baseline = texts(Decoder(target, max_batch=2, max_context=128), PROMPTS, 20)
    assert baseline == want
    for batch in (1, 3):
        assert texts(Decoder(target, drafter, max_batch=batch, max_context=128), PROMPTS, 20) == baseline


def test_target_layer_ids_are_transformers_hidden_states():
    model = make("qwen3")
    ids = torch.randint(0, VOCAB, (1, 12))
    with torch.no_grad():
        want = model(ids, output_hidden_states=True).hidden_states
    target = HFTarget(model)
    caches = target.cache.allocate(4, 16)
    position = torch.arange(12)[None]
    table, none, whole = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [0], [12]))
    _, features = target.make_pass(1, 12, caches, (3, 0, 2)).run(ids, position, position, table, none, whole)
    for i, layer in enumerate((3, 0, 2)):
        torch.testing.assert_close(features.view(12, 3, -1)[:, i], want[layer + 1][0], atol=1e-4, rtol=1e-4)


def test_a_difference_is_reported_with_its_margin():
    target = HFTarget(make("llama"))
    baseline = texts(Decoder(target, max_batch=1, max_context=128), PROMPTS[:1], 12)[0]
    assert first_difference(target, PROMPTS[0], baseline, baseline) is None
    other = [*baseline[:7], (baseline[7] + 1) % VOCAB, *baseline[8:]]
    found = first_difference(target, PROMPTS[0], baseline, other)
    assert (found.index, found.baseline, found.speculative) == (7, baseline[7], other[7]) and found.margin > 0
    assert "token 7: baseline" in str(found)
    assert first_difference(target, PROMPTS[0], baseline, baseline[:5]).margin is None


def test_a_margin_is_of_the_logits_that_chose():
    """The head's bias belongs to them."""
    model = make_phimoe(512)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    found = first_difference(HFTarget(model), PROMPTS[0], [best], [second])
    assert found.margin == pytest.approx(float(logits[best] - logits[second]), rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "minimax_m2"])
def test_in_bfloat16_any_difference_is_a_near_tie(kind, record_property):
    target = HFTarget(make(kind, torch.bfloat16))
    drafter = Drafter.random(target, num_layers=2, block_size=8)
    baseline = texts(Decoder(target, max_batch=1, max_context=128), PROMPTS, 40)
    spec = texts(Decoder(target, drafter, max_batch=1, max_context=128), PROMPTS, 40)
    different = 0
    for i, prompt in enumerate(PROMPTS):
        found = first_difference(target, prompt, baseline[i], spec[i])
        record_property(f"difference_{kind}_{i}", str(found))
        assert found is None or abs(found.margin) < 0.06, str(found)
        different += found is not None
    assert different < 2  # near ties are rare


def test_the_model_refuses_to_run_outside_the_target():
    model = make("llama")
    HFTarget(model)
    with pytest.raises(RuntimeError, match="run it through that"):
        model(torch.tensor([[1, 2]]))
    model.set_attn_implementation("sdpa")
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCAB)


def test_a_model_without_attention_is_refused():
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB)
    with pytest.raises((NotImplementedError, ValueError), match="HFTarget|attention"):
        HFTarget(transformers.MambaForCausalLM(config))


def test_what_the_pages_cannot_hide_is_refused():
    """Each layer attends through the interface, so the text would be wrong without a word."""
    config = transformers.PhimoeConfig(**COMMON, sliding_window=8, num_local_experts=4)
    model = transformers.PhimoeForCausalLM(config)
    with pytest.raises(NotImplementedError, match="window of 8"):
        texts(Decoder(HFTarget(model), max_batch=1, max_context=128), [PROMPTS[1]], 4)


@pytest.mark.parametrize(("kind", "words"), {
    "deepseek_v3": "keeps latent vectors, not keys and values (MLA, kv_lora_rank = 512), which have no pages",
    "glm4_moe_lite": "keeps latent vectors",  # keys and values of 256 dimensions both
    "mimo_v2_flash": "has keys of 192 and values of 128 dimensions",
    "gemma4": "has layers with keys of several shapes, and pages have one",
    "gemma4_text": "has layers with keys of several shapes",
    "llama4": "attends in chunks of 8192 tokens",
    "mllama": "has layers that attend to images alone",
    "mamba2": "has no layer that attends, and so no pages",
    "xlstm": "keeps state other than keys and values that is not in transformers' cache",
    "falcon": "does not use transformers' attention interface",
    "bert": "does not attend causally, as its config makes it an encoder",
    "llava": "model_type 'llava' is a multimodal model, with vision_config; a target must be a causal language model",
    "qwen2_audio": "model_type 'qwen2_audio' is a multimodal model, with audio_config",
    "t5": "model_type 't5' reads with an encoder; a target must be a causal language model of text",
    "vit": "model_type 'vit' is not a causal language model",
    "klingon": f"model_type 'klingon' is unknown to transformers {transformers.__version__}; a newer version may",
}.items())
def test_a_model_that_is_no_target_is_refused_by_its_config_alone(tmp_path, kind, words):
    """There are no weights: a message about them would come too late."""
    folder = tiny.write_target(tmp_path)
    (folder / "model.safetensors").unlink()
    if kind == "klingon":
        (folder / "config.json").write_text('{"model_type": "klingon"}')
    elif kind in transformers.CONFIG_MAPPING:
        transformers.CONFIG_MAPPING[kind]().save_pretrained(folder)
    else:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    with pytest.raises(CheckpointError) as error:
        Session.load(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}: ") and words in message, message
    assert "\n" not in message and len(message) < len(str(folder)) + 260, message


def test_the_text_of_a_multimodal_model_is_a_target():
    text = {**COMMON, "head_dim": 32, "layer_types": ["full_attention"] * COMMON["num_hidden_layers"]}
    seen = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(text_config=text, vision_config=seen))
    randomise(model.eval())
    want = baseline_text(model, PROMPTS[1], 8)
    assert texts(Decoder(HFTarget(model), max_batch=1, max_context=128), [PROMPTS[1]], 8) == [want]


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", None, torch.nn.Linear(1, 1)], ids=["name", "none", "module"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="HFTarget: model must be a transformers model for causal language modelling"):
        HFTarget(model)


def test_a_window_that_nothing_reaches_is_no_obstacle():
    model = make_phimoe(512)
    want = baseline_text(model, PROMPTS[1], 8)
    assert texts(Decoder(HFTarget(model), max_batch=1, max_context=128), [PROMPTS[1]], 8) == [want]


def make_phimoe(window):
    torch.manual_seed(0)
    model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(
        **COMMON, sliding_window=window, num_local_experts=4, lm_head_bias=True)).eval()
    randomise(model)
    return model


@pytest.mark.parametrize(("name", "changes"), [
    ("Llama", {}), ("Cohere", {"logit_scale": 0.25}), ("Granite", {"logits_scaling": 4.0}),
    ("HyperCLOVAX", {"logits_scaling": 4.0}), ("Gemma2", {"head_dim": 32, "final_logit_softcapping": 2.0}),
])
def test_logits_are_those_of_the_models_own_class(name, changes):
    """Greedy text does not show their scale; what a temperature draws does."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(model)
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        rows, want = model.base_model(ids).last_hidden_state[0], model(ids).logits[0]
    target = HFTarget(model)
    found, best, values = torch.empty_like(want), torch.empty(len(rows)).long(), torch.empty(len(rows))
    target.logits(rows, found)
    target.next_ids(rows, best, values)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(values, want.max(-1).values)
