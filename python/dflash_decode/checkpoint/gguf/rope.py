"""The rotary embedding that a GGUF file's metadata describe."""

from ..errors import CheckpointError
from ..fields import MOST_HEAD_DIM, Fields

# Further settings of rope scaling, and the values at which they say what "type" and "factor" say alone.
_YARN = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_beta_fast": 32.0,
         "yarn_beta_slow": 1.0, "yarn_log_multiplier": 0.0}


def read_rope(f: Fields, arch: str, head_dim: int) -> dict:
    """rope_parameters of the Hugging Face config; their reader checks the ranges."""
    rope = {"rope_type": "default", "rope_theta": f.number(f"{arch}.rope.freq_base", 10000.0, above=1.0)}
    scaling = f.text(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": f.number(f"{arch}.rope.scaling.factor", 1.0, above=0.0),
                 "original_max_position_embeddings": f.whole(f"{arch}.rope.scaling.original_context_length",
                                                             f.whole(f"{arch}.context_length"))}
    for name, neutral in _YARN.items():
        if (value := f.number(f"{arch}.rope.scaling.{name}", neutral)) != neutral:
            raise CheckpointError(f"{f.what}: {arch}.rope.scaling.{name} must be {neutral:g}; got {value:g}")
    rotary = f.whole(f"{arch}.rope.dimension_count", head_dim, most=MOST_HEAD_DIM)
    if rotary != head_dim:
        rope["partial_rotary_factor"] = rotary / head_dim
    return rope
