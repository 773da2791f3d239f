"""Tiny GGUF files, good ones and such as their metadata say otherwise."""

import gguf
import numpy as np

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB, LAYERS = 4, 2, 8, 32, 64, 40, 2
DROP = object()


def names_and_shapes(arch):
    yield "token_embd.weight", (VOCAB, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,), "attn_q": (HEADS * HEAD_DIM, HIDDEN), "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD_DIM), "ffn_norm": (HIDDEN,),
            "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP),
        }.items():
            yield f"blk.{i}.{name}.weight", shape
        if arch == "qwen3":
            yield f"blk.{i}.attn_q_norm.weight", (HEAD_DIM,)
            yield f"blk.{i}.attn_k_norm.weight", (HEAD_DIM,)


def quantised(types, arch="llama"):
    """Tensors of a tiny model. types: of a GGUF tensor by what its name ends in."""
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in names_and_shapes(arch):
        values = rng.standard_normal(shape, dtype=np.float32) * (1 if len(shape) == 1 else 0.3)
        kind = next((kind for ending, kind in types.items() if name.endswith(f"{ending}.weight")), None)
        found[name] = values if kind is None else (gguf.quants.quantize(values, kind), kind)
    return found


def write_gguf(path, arch="llama", drop=(), tensors=None, **changes):
    """A tiny GGUF file; `changes` replace or, given DROP, leave out metadata (dots as double underscores)."""
    rng = np.random.default_rng(0)
    if tensors is None:
        tensors = {n: rng.standard_normal(s, dtype=np.float32) for n, s in names_and_shapes(arch) if n not in drop}
    fields = {
        "context_length": 128, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": MLP,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
        "rope.freq_base": 5e5, "vocab_size": VOCAB, "attention.layer_norm_rms_epsilon": 1e-6,
    }
    fields = {f"{arch}.{k}": v for k, v in fields.items()} | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["<e>", "a", "b", "ab"] + [f"t{i}" for i in range(VOCAB - 4)],
        "tokenizer.ggml.token_type": [3] + [1] * (VOCAB - 1), "tokenizer.ggml.eos_token_id": 0,
    }
    for key, value in changes.items():
        fields[key.replace("__", ".").replace("ARCH", arch)] = value
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        if value is DROP:
            continue
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
         bool: writer.add_bool}[type(value)](key, value)
    for name, values in tensors.items():
        if isinstance(values, tuple):  # blocks, and their type
            writer.add_tensor(name, values[0], raw_dtype=values[1])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
