"""Tiny random models for the decode tests, made in memory, and the scripts of bench/ that tests use."""


import pytest
import torch

from tests.support.decode_runs import VOCAB

transformers = pytest.importorskip("transformers")

COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": None,
          "eos_token_id": None, "pad_token_id": None}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
F, S = "full_attention", "sliding_attention"
FAMILIES = {
    "cwm-window": ("Cwm", {"head_dim": 16, "sliding_window": 12, "bos_token_id": 1}),
    "glm4-moe": ("Glm4Moe", {
        "head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 1.5, "n_shared_experts": 2, "use_qk_norm": True,
        "attention_bias": True}),
    "gpt-oss": ("GptOss", {"head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 12,
                           "intermediate_size": 48, "rope_parameters": YARN | {"truncate": False}}),
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 32,
                             "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-dynamic": ("Llama", {"max_position_embeddings": 64, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "minimax-m2": ("MiniMaxM2", {"head_dim": 32, "num_local_experts": 16, "num_experts_per_tok": 3, "rotary_dim": 16,
                                 "intermediate_size": 48}),
    "ministral-window": ("Ministral", {"head_dim": 16, "sliding_window": 12, "layer_types": [S, F, S, S]}),
    "ministral3": ("Ministral3", {"head_dim": 32, "sliding_window": 12, "rope_parameters": YARN | {
        "original_max_position_embeddings": 6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
                               "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN}),
    "smollm3-window": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 10, "no_rope_layers": [1, 0, 1, 0]}),
}
EXPERTS = ("glm4-moe", "gpt-oss", "minimax-m2", "mixtral", "qwen3-moe")


def make_target(family: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(transformers model, NativeTarget of the same weights). Norms, biases and scores are far from their initial
    values, so that none can be forgotten unseen."""
    from dflash_decode.model.native import NativeTarget

    kind, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **changes})
    config._experts_implementation = "eager"  # the grouped product has no float64
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    randomise(model)
    model.to(dtype)
    return model, NativeTarget(config.to_dict(), model.state_dict())


def randomise(model) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = 0.3 * torch.randn_like(parameter) + parameter.data
        else:
            parameter.data = torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn_like(buffer))


@torch.no_grad()
def baseline_text(model, prompt, n, stops=()):
    """Greedy decoding by transformers, with no cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt):]
