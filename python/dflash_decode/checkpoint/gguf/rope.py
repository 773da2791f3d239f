"""The rotary embedding that a GGUF file's metadata and tensors describe."""

from collections.abc import Mapping

import numpy as np

from ..errors import CheckpointError
from ..fields import MOST_HEAD_DIM, Fields, shown

# Further settings of rope scaling, and the values at which they say what "type" and "factor" say alone.
_YARN = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_beta_fast": 32.0,
         "yarn_beta_slow": 1.0, "yarn_log_multiplier": 0.0}
_ALWAYS, _LONG, _SHORT = FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read_rope(f: Fields, arch: str, head_dim: int, stored: Mapping = {}) -> dict:
    """rope_parameters of the Hugging Face config; their reader checks the ranges. stored: a file's tensors by their
    names, as its reader has them."""
    rope = {"rope_type": "default", "rope_theta": f.number(f"{arch}.rope.freq_base", 10000.0, above=1.0)}
    # Old files have another name for a linear factor, or give a factor without a type.
    factor = f.number(f"{arch}.rope.scaling.factor", f.number(f"{arch}.rope.scale_linear", 0.0, least=0.0) or 1.0,
                      above=0.0)
    scaling = f.text(f"{arch}.rope.scaling.type", "none" if factor == 1.0 else "linear")
    rotary = f.whole(f"{arch}.rope.dimension_count", head_dim, most=MOST_HEAD_DIM)
    if rotary != head_dim:
        rope["partial_rotary_factor"] = rotary / head_dim
    if found := [name for name in FACTORS if name in stored]:
        if scaling not in ("none", "longrope"):
            f.refuse(f"{arch}.rope.scaling.type", f"none or longrope beside {found[0]}", scaling)
        return rope | _longrope(f, arch, stored, rotary)
    if scaling == "longrope":
        raise CheckpointError(f"{f.what}: expected a tensor {_LONG} for rope.scaling.type longrope; got none")
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": factor}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = f.whole(f"{arch}.rope.scaling.original_context_length",
                                                           f.whole(f"{arch}.context_length"))
    for name, neutral in _YARN.items():
        if (value := f.number(f"{arch}.rope.scaling.{name}", neutral)) != neutral:
            raise CheckpointError(f"{f.what}: {arch}.rope.scaling.{name} must be {neutral:g}; got {value:g}")
    return rope


def _longrope(f: Fields, arch: str, stored: Mapping, rotary: int) -> dict:
    """A factor for each frequency: the same at every length as of Llama 3.1, or others in contexts that are longer
    than the original ones (Phi-3)."""
    names = (_ALWAYS, _ALWAYS) if _ALWAYS in stored else (_SHORT, _LONG)
    short, long = (_factors(f, stored, name, rotary) for name in names)
    context = f.whole(f"{arch}.context_length")
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long,
            "attention_factor": f.number(f"{arch}.rope.scaling.attn_factor", 1.0, above=0.0),
            "original_max_position_embeddings": context if _ALWAYS in stored else f.whole(
                f"{arch}.rope.scaling.original_context_length", context)}


def _factors(f: Fields, stored: Mapping, name: str, rotary: int) -> list[float]:
    if name not in stored:
        raise CheckpointError(f"{f.what}: expected a tensor {name}; got none of that name")
    tensor = stored[name]
    values = np.asarray(tensor.data).reshape(-1) if tensor.tensor_type.name == "F32" else np.zeros(0)
    if len(values) != rotary // 2 or not np.all(np.isfinite(values) & (values > 0)):
        raise CheckpointError(f"{f.what}: {name} must have {rotary // 2} factors above 0 in F32; got "
                              f"{tensor.n_elements} in {tensor.tensor_type.name}: {shown(values[:4].tolist())}")
    return [float(str(value)) for value in values.astype(np.float32)]
