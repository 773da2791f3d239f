"""Reads GGUF files as Hugging Face checkpoints (config, dequantised tensors, tokenizer), converted once and cached."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ..blocks import FORMATS, Blocks
from ..errors import CheckpointError, brief, warn
from ..fields import MOST_HEAD_DIM, MOST_LAYERS, Fields
from ..safetensors import Checkpoint, read_directory
from .cache import cached, entry_of, keep
from .drafter import ARCHITECTURES, drafter_name, read_drafter
from .families import TARGETS, Family
from .reader import field, metadata, open_file
from .rope import read_rope

_CACHE_LIMIT = 2 << 30  # bytes of bfloat16; larger models are dequantised each time, not copied into the home folder
# Texts of tokens that end an answer or a turn.
_ENDS = frozenset(("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>",
                   "<|end_of_text|>", "<|return|>", "<|call|>", "<EOT>"))
_FORMATS = "block_formats"  # in a cached config.json: the format of every weight that is kept in blocks


def load(path: Path, dtype: torch.dtype, blocks: bool = False) -> Checkpoint:
    """The checkpoint in a GGUF file, dequantised to `dtype`; with `blocks`, weights in a format of the ops stay as they
    are. The cache serves bfloat16 only."""
    entry = entry_of(path, blocks)
    if dtype == torch.bfloat16 and (kept := cached(path, blocks)):
        with contextlib.suppress(CheckpointError):  # another process may remove it meanwhile
            found = read_directory(kept)
            formats = found.config.pop(_FORMATS, {})
            tensors = {name: Blocks(cast(torch.Tensor, t), formats[name]) if name in formats else t
                       for name, t in found.tensors.items()}
            return Checkpoint(found.config, tensors, str(path))
    reader = open_file(path)
    config = read_config(path, reader)
    tensors = read_tensors(path, reader, config, dtype, blocks)
    if dtype == torch.bfloat16 and sum(t.nbytes for t in tensors.values()) <= _CACHE_LIMIT:
        _keep(path, entry, config, tensors, reader)
    return Checkpoint(config, tensors, str(path))


def _keep(path: Path, entry: Path | None, config: dict, tensors: dict, reader) -> None:
    from .tokenizer import tokenizer_files

    try:
        files = tokenizer_files(path, reader)
    except CheckpointError:  # loading the tokenizer reports it; the weights are good
        return
    formats = {name: t.format for name, t in tensors.items() if isinstance(t, Blocks)}
    plain = {name: t.data if isinstance(t, Blocks) else t for name, t in tensors.items()}
    keep(path, entry, plain, files | {"config.json": json.dumps(config | {_FORMATS: formats}, indent=1)})


def has_blocks(path: Path) -> bool:
    """Whether a GGUF file has weights in a format of the ops, and our own layers run it. Where its blocks are cached,
    the file is not parsed."""
    if cached(path, blocks=True) is not None:
        return True
    reader = open_file(path)
    family = TARGETS.get(metadata(path, reader).text("general.architecture", ""))
    return (family is None or family.native) and any(_format_of(t) for t in reader.tensors)


def _format_of(stored) -> str | None:
    """The ops' name of a stored tensor's format; None for elements, vectors and other formats."""
    name = stored.tensor_type.name.lower()
    return name if name in FORMATS and len(stored.shape) == 2 else None


def read_config(path: Path, reader) -> dict:
    """The Hugging Face config that the metadata describe."""
    f = metadata(path, reader)
    arch = f.text("general.architecture")
    if arch in ARCHITECTURES:
        return read_drafter(f, arch, {t.name: t.shape.tolist() for t in reader.tensors})
    if arch not in TARGETS:
        raise CheckpointError(f"{path}: general.architecture must be {', '.join((*TARGETS, *ARCHITECTURES))}; got "
                              f"{arch!r}, for which there is the model's directory with config.json and safetensors")
    family = TARGETS[arch]
    config = _common(path, f, arch, family, reader)
    return config | family.config(f, arch, config)


def _common(path: Path, f: Fields, arch: str, family: Family, reader) -> dict:
    """The fields that all families share."""
    tensors = {t.name: t for t in reader.tensors}
    heads, hidden = f.whole(f"{arch}.attention.head_count"), f.whole(f"{arch}.embedding_length")
    head_dim = f.whole(f"{arch}.attention.key_length", max(hidden // heads, 1), most=MOST_HEAD_DIM)
    if f.whole(f"{arch}.attention.value_length", head_dim) != head_dim:
        f.refuse(f"{arch}.attention.value_length", f"key_length = {head_dim}", f.get(f"{arch}.attention.value_length"))
    context, rope = f.whole(f"{arch}.context_length"), read_rope(f, arch, head_dim, tensors)
    embedding, ends = tensors.get("token_embd.weight"), stop_ids(path, reader)
    if embedding is not None and len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: token_embd.weight must have 2 dimensions; got {len(embedding.shape)}")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": f.whole(f"{arch}.block_count", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": f.whole(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": f.whole(f"{arch}.feed_forward_length", None if family.has_experts else ...),
        "vocab_size": int(embedding.shape[1]) if embedding is not None else f.whole(f"{arch}.vocab_size"),
        "rms_norm_eps": f.number(f"{arch}.attention.layer_norm_rms_epsilon", above=0.0, most=1.0),
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": context,
        "bos_token_id": field(path, reader, "tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "dtype": "bfloat16",
    }


def stop_ids(path: Path, reader) -> list[int]:
    """The tokens that end an answer: those that the file names, and those that end one by their text in any model, as
    in llama.cpp: files name the end of sequence alone where a turn has an end of its own."""
    named = [field(path, reader, f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot", "eom")]
    tokens = field(path, reader, "tokenizer.ggml.tokens", list, [])
    by_text = {text: token for token, text in enumerate(tokens) if text in _ENDS}
    if {"<|return|>", "<|call|>"} <= {*by_text}:
        by_text.pop("<|end|>", None)  # gpt-oss ends messages with it, of which an answer has several
    return list(dict.fromkeys([*(token for token in named if token is not None), *by_text.values()]))


def read_tensors(path: Path, reader, config: dict, dtype: torch.dtype,
                 blocks: bool = False) -> dict[str, torch.Tensor | Blocks]:
    """All tensors, dequantised to float32 and rounded to `dtype`, or as Blocks, under their Hugging Face names."""
    family = None if "dflash_config" in config else TARGETS[metadata(path, reader).text("general.architecture")]
    name_of = drafter_name if family is None else family.name
    names = {stored.name: name_of(stored.name) for stored in reader.tensors}
    _check_names(path, config, names, family)
    tensors: dict[str, torch.Tensor | Blocks] = {}
    expanded: set[str] = set()
    for stored in reader.tensors:
        if not (name := names[stored.name]):
            continue
        most = 3 if name.endswith("base_kernel") or stored.name.endswith("_exps.weight") else 2
        if not 1 <= len(stored.shape) <= most or not stored.n_elements:
            raise CheckpointError(f"{path}: {stored.name} must have 1 {'to' if most > 2 else 'or'} {most} dimensions, "
                                  f"none of them 0; got {stored.shape.tolist()}")
        if name in tensors:
            raise CheckpointError(f"{path}: {name} must be there once; got it again as {stored.name}")
        if name == "d2t":
            tensors[name] = _offsets(path, stored)
            continue
        kept = _format_of(stored) if blocks else None
        if blocks and not kept and stored.tensor_type.name not in ("F32", "F16", "BF16"):
            expanded.add(stored.tensor_type.name + " (experts)" * stored.name.endswith("_exps.weight"))
        values = _values(path, stored, config, family, kept)
        # A copy: what needs no dequantising is otherwise a read-only view of the file.
        tensors[name] = Blocks(torch.from_numpy(np.array(values)), kept) if kept else \
            torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)
    if expanded:
        warn(f"{path}: weights in {', '.join(sorted(expanded))} are expanded to {str(dtype).removeprefix('torch.')}; "
             f"{', '.join(FORMATS)} stay as they are")
    return tensors if family is None else _converted(path, family, tensors)


def _offsets(path: Path, stored) -> torch.Tensor:
    """d2t as other checkpoints have it: the distance from a row of the draft head to its token, which is here."""
    if stored.tensor_type.name not in ("I64", "I32"):
        raise CheckpointError(f"{path}: d2t must be of I64 or I32; got {stored.tensor_type.name}")
    return torch.from_numpy(stored.data.astype(np.int64) - np.arange(stored.data.size))


def _values(path: Path, stored, config: dict, family: Family | None, kept: str | None) -> np.ndarray:
    """A tensor's elements, or the bytes of its blocks, in the rows of a Hugging Face checkpoint."""
    from gguf.quants import dequantize

    try:
        values = stored.data if kept else dequantize(stored.data, stored.tensor_type)
    except Exception as error:
        raise CheckpointError(f"{path}: {stored.name} ({stored.tensor_type.name}) cannot be dequantised: "
                              f"{brief(error)}") from None
    if family is None:
        return values
    if family.interleaved and (".attn_q." in stored.name or ".attn_k." in stored.name):
        kind = "num_attention_heads" if ".attn_q." in stored.name else "num_key_value_heads"
        return _neox_rows(path, stored.name, values, config[kind])
    return values - np.float32(family.offset) if family.offset and stored.name.endswith("norm.weight") else values


def _converted(path: Path, family: Family, tensors: dict) -> dict:
    try:
        return family.converted(tensors)
    except (KeyError, RuntimeError, IndexError) as error:  # a part is missing, or has another shape than its neighbour
        raise CheckpointError(f"{path}: the experts of a {family.model_type} model must fit together; "
                              f"got {brief(error)}") from None


def _neox_rows(path: Path, name: str, values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order for interleaved RoPE: per head (pair, half) back to (half, pair)."""
    rows = values.shape[0]
    if rows % (2 * heads):
        raise CheckpointError(f"{path}: {name} must have rows for {heads} heads of an even size; got {rows} rows")
    return values.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _check_names(path: Path, config: dict, names: Mapping[str, str | None], family: Family | None) -> None:
    """Raises CheckpointError for a missing tensor or one that no layer has, before any is dequantised. It stops at the
    first missing layer, however many the file claims. What a drafter lacks is found where its layers are made."""
    kind = "DFlash drafter" if family is None else f"{config['model_type']} model"
    for name in sorted(names):
        if names[name] is None:
            raise CheckpointError(f"{path}: expected the tensors of a {kind}; got {name}")
    for name in () if family is None else family.needed(config["num_hidden_layers"]):
        if name not in names:
            raise CheckpointError(f"{path}: expected a tensor {name}; got none of that name among {len(names)}")
