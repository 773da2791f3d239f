"""GGUF files as Hugging Face checkpoints: config, dequantised tensors and tokenizer, converted once and kept.

The converted form is an ordinary Hugging Face directory under the user's cache directory ($DFLASH_CACHE, else
$XDG_CACHE_HOME/dflash_kernels, else ~/.cache/dflash_kernels), keyed by the file's path, size and time of change, and
moved into place whole, so that a reader never sees a half-written one. Writing one removes those whose file is gone or
has changed since.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from .gguf_reader import field, open_file
from .weights import Checkpoint, CheckpointError, brief, read_directory

_SOURCE = "converted-from"  # the file in a converted directory that names the GGUF file
_FORMAT = 2  # raise it when the conversion changes: it is part of the cache key
_CACHE_LIMIT = 2 << 30  # bytes of bfloat16; larger models are dequantised each time, not copied into the home folder
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Further settings of rope scaling, and the values at which they say what "type" and "factor" say alone.
_YARN = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_beta_fast": 32.0,
         "yarn_beta_slow": 1.0, "yarn_log_multiplier": 0.0}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}


def load(path: Path, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint in a GGUF file, dequantised to `dtype`; from the cache when it is there (bfloat16 only)."""
    kept = cached(path) if dtype == torch.bfloat16 else None
    if kept:
        with contextlib.suppress(CheckpointError):  # a damaged copy is made again
            found = read_directory(kept)
            return Checkpoint(found.config, found.tensors, str(path))
        shutil.rmtree(kept, ignore_errors=True)
    reader = open_file(path)
    config = read_config(path, reader)
    tensors = read_tensors(path, reader, config, dtype)
    if dtype == torch.bfloat16 and sum(t.nbytes for t in tensors.values()) <= _CACHE_LIMIT:
        _keep(path, config, tensors, reader)
    return Checkpoint(config, tensors, str(path))


def cache_dir() -> Path:
    if chosen := os.environ.get("DFLASH_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dflash_kernels"


def cached(path: Path) -> Path | None:
    """The converted directory of a GGUF file, or None."""
    folder = _key(path)
    return folder if (folder / "config.json").is_file() else None


def _key(path: Path) -> Path:
    source, stat = path.resolve(), path.stat()
    text = f"{_FORMAT}|{source}|{stat.st_size}|{stat.st_mtime_ns}"
    return cache_dir() / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _keep(path: Path, config: dict, tensors: dict, reader) -> None:
    """Writes the converted directory. A cache that cannot be written is only a slower second start."""
    from .gguf_tokenizer import tokenizer_files

    target, temporary = _key(path), None
    notes = {"config.json": json.dumps(config, indent=1), _SOURCE: str(path.resolve())}
    try:
        files = tokenizer_files(path, reader)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
        save_file(tensors, temporary / "model.safetensors")
        for name, content in (files | notes).items():
            (temporary / name).write_text(content, encoding="utf-8")
        os.rename(temporary, target)
        _remove_stale()
    except (OSError, CheckpointError):
        pass
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale() -> None:
    for note in cache_dir().glob(f"*/{_SOURCE}"):
        source = Path(note.read_text(encoding="utf-8"))
        if not source.is_file() or _key(source) != note.parent:
            shutil.rmtree(note.parent, ignore_errors=True)


def read_config(path: Path, reader) -> dict:
    """The Hugging Face config that the metadata describe."""
    arch = field(path, reader, "general.architecture", str)
    if arch not in _CLASSES:
        raise CheckpointError(f"{path}: general.architecture must be {' or '.join(_CLASSES)}; got {arch!r}")

    def get(key, kind=int, default=...):
        return field(path, reader, f"{arch}.{key}", kind, default)

    names = {t.name: t for t in reader.tensors}
    if get("expert_count", int, 0):
        raise CheckpointError(f"{path}: {arch}.expert_count must be 0 (a dense model); got {get('expert_count')}")
    if "rope_freqs.weight" in names:
        raise CheckpointError(f"{path}: rope_freqs.weight (scaled RoPE frequencies) is not supported")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    if heads < 1 or hidden < 1:
        raise CheckpointError(f"{path}: head_count and embedding_length must be positive; got {heads}, {hidden}")
    head_dim = get("attention.key_length", int, hidden // heads)
    if get("attention.value_length", int, head_dim) != head_dim:
        raise CheckpointError(f"{path}: attention.value_length must equal key_length {head_dim}; "
                              f"got {get('attention.value_length')}")
    rope = {"rope_type": "default", "rope_theta": get("rope.freq_base", float, 10000.0)}
    scaling = get("rope.scaling.type", str, "none")
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": get("rope.scaling.factor", float, 1.0),
                 "original_max_position_embeddings": get("rope.scaling.original_context_length", int,
                                                         get("context_length"))}
    for name, neutral in _YARN.items():
        if (value := get(f"rope.scaling.{name}", float, neutral)) != neutral:
            raise CheckpointError(f"{path}: {arch}.rope.scaling.{name} must be {neutral:g}; got {value:g}")
    rotary = get("rope.dimension_count", int, head_dim)
    if rotary != head_dim:
        rope["partial_rotary_factor"] = rotary / head_dim
    embedding = names.get("token_embd.weight")
    ends = stop_ids(path, reader)
    return {
        "architectures": [_CLASSES[arch]],
        "model_type": arch,
        "hidden_size": hidden,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "vocab_size": int(embedding.shape[1]) if embedding is not None else get("vocab_size"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "max_position_embeddings": get("context_length"),
        "bos_token_id": field(path, reader, "tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "dtype": "bfloat16",
    }


def stop_ids(path: Path, reader) -> list[int]:
    """The tokens that end an answer: end of sequence, and end of turn where the file names one."""
    found = [field(path, reader, f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot")]
    return list(dict.fromkeys(token for token in found if token is not None))


def hf_name(name: str) -> str | None:
    """A GGUF tensor name as Hugging Face calls it, or None."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _LAYER:
        return None
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def read_tensors(path: Path, reader, config: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors, dequantised to float32 and rounded to `dtype`, under their Hugging Face names."""
    from gguf.quants import dequantize

    tensors = {}
    for stored in reader.tensors:
        name = hf_name(stored.name)
        if name is None:
            raise CheckpointError(f"{path}: expected the tensors of a {config['model_type']} model; got {stored.name}")
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except Exception as error:
            raise CheckpointError(f"{path}: {stored.name} ({stored.tensor_type.name}) cannot be dequantised: "
                                  f"{brief(error)}") from None
        if config["model_type"] == "llama" and (".attn_q." in stored.name or ".attn_k." in stored.name):
            kind = "num_attention_heads" if ".attn_q." in stored.name else "num_key_value_heads"
            values = _neox_rows(path, stored.name, values, config[kind])
        # A copy: what needs no dequantising is otherwise a read-only view of the file.
        tensors[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)
    _check_complete(path, config, tensors)
    return tensors


def _neox_rows(path: Path, name: str, values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order for interleaved RoPE: per head (pair, half) back to (half, pair)."""
    rows = values.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{path}: {name} must have rows for {heads} heads of an even size; got {rows} rows")
    return values.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _check_complete(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    needed = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    if config["model_type"] == "qwen3":
        needed += ["attn_q_norm", "attn_k_norm"]
    names = ["token_embd.weight", "output_norm.weight"]
    names += [f"blk.{i}.{n}.weight" for i in range(config["num_hidden_layers"]) for n in needed]
    for name in names:
        if hf_name(name) not in tensors:
            raise CheckpointError(f"{path}: expected a tensor {name}; got none of that name among {len(tensors)}")
