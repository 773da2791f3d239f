"""Tiny checkpoints on disk, for tests of everything that loads one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS, CONTEXT = 264, 64, 4, 2, 64, 128, 4, 128
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def _layer(prefix: str, generator: torch.Generator, qk_norm: bool) -> dict[str, torch.Tensor]:
    def weight(*shape):
        return (torch.randn(shape, generator=generator) * 0.1).bfloat16()

    ones = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    if qk_norm:
        ones |= {"self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
    shapes = {"self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
              "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
              "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}
    made = {name: weight(*shape) for name, shape in shapes.items()}
    made |= {name: torch.ones(size).bfloat16() for name, size in ones.items()}
    return {f"{prefix}{name}.weight": t for name, t in made.items()}


def _geometry(layers: int) -> dict:
    return {"hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": MLP, "vocab_size": VOCAB,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": CONTEXT}


def write_target(folder: Path) -> Path:
    """A Llama of four layers that reads and writes bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {"model.embed_tokens.weight": torch.randn((VOCAB, HIDDEN), generator=generator).bfloat16(),
               "model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    for i in range(LAYERS):
        tensors |= _layer(f"model.layers.{i}.", generator, qk_norm=False)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(
        _geometry(LAYERS) | {"model_type": "llama", "tie_word_embeddings": True, "eos_token_id": VOCAB - 1}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<u>", "<a>", *(f"<x{i}>" for i in range(VOCAB - len(alphabet) - 3)), "<end>"]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    return folder


def write_drafter(folder: Path, **changes) -> Path:
    """A drafter of two layers for that target, with random weights and a block of 4. A change to None drops a field."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(2)
    target_layer_ids = [0, 2]
    tensors = {
        "fc.weight": (torch.randn((HIDDEN, len(target_layer_ids) * HIDDEN), generator=generator) * 0.1).bfloat16(),
        "hidden_norm.weight": torch.ones(HIDDEN).bfloat16(),
        "norm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    for i in range(2):
        tensors |= _layer(f"layers.{i}.", generator, qk_norm=True)
    save_file(tensors, folder / "model.safetensors")
    config = _geometry(2) | {"block_size": 4, "num_target_layers": LAYERS,
                             "dflash_config": {"mask_token_id": 0, "target_layer_ids": target_layer_ids}} | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder
