"""Writes a DFlash drafter as the GGUF file that llama.cpp reads next to the target's: architecture "dflash".

llama.cpp's own converter needs its source tree and a gguf package newer than the released one. The file has no
embedding and no LM head: they are the target's, in the target's quantisation.
"""

from pathlib import Path

import gguf
import torch

from bench.peers.gguf_files import copy_field, writing
from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.model.config import read_draft_config

TOP = {"fc.weight": "fc.weight", "hidden_norm.weight": "enc.output_norm.weight", "norm.weight": "output_norm.weight"}
LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def tensor_name(name: str) -> str:
    """The tensor's GGUF name. Raises KeyError for a tensor that llama.cpp does not support."""
    if name in TOP:
        return TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER[rest.removesuffix('.weight')]}.weight"


def write(draft: str, target: str, file: Path) -> Path:
    """Writes the drafter's directory as one file, with the vocabulary of the target's GGUF file, atomically."""
    found = load_checkpoint(draft, torch.bfloat16)
    c, raw = read_draft_config(found.config), found.config
    if c.conv or c.selector or c.from_anchor:
        raise NotImplementedError(f"{draft}: drafter must be one of DFlash alone for llama.cpp; got one of DFlash2 or "
                                  "DSpark, which is not written")
    with writing(file, "dflash") as writer:
        writer.add_block_count(c.num_layers)
        writer.add_context_length(raw["max_position_embeddings"])
        writer.add_embedding_length(c.hidden_size)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_heads)
        writer.add_head_count_kv(c.num_kv_heads)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_rope_freq_base(raw["rope_theta"])
        writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
        writer.add_causal_attention(False)
        writer.add_uint32("dflash.block_size", c.block_size)
        writer.add_array("dflash.target_layers", [i + 1 for i in c.target_layer_ids])  # a layer's input, not its output
        writer.add_mask_token_id(c.mask_token_id)
        for name, field in gguf.GGUFReader(target).fields.items():
            if name.startswith("tokenizer."):
                copy_field(writer, name, field)
        for name, tensor in found.tensors.items():
            # Norms in float32 and products in bfloat16, as llama.cpp's converter has them.
            exact, raw_type = tensor.float().numpy(), gguf.GGMLQuantizationType.BF16
            data = exact if tensor.ndim == 1 else gguf.quants.quantize(exact, raw_type)
            writer.add_tensor(tensor_name(name), data, raw_dtype=None if tensor.ndim == 1 else raw_type)
    return file
