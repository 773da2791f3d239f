"""Loads a model for HFTarget. Its config.json is checked before any weight is read."""

from pathlib import Path
from typing import Any

import torch
import transformers

from ..checkpoint import Checkpoint
from ..checkpoint.errors import CheckpointError, brief, read_json
from ..inputs import shown
from .hf import HFTarget, refuse_model


def load_hf(folder: Path, dtype: torch.dtype, device: torch.device) -> HFTarget:
    """The target of a directory. Raises as read_model."""
    return HFTarget(read_model(folder, dtype).to(device))


def read_model(folder: Path, dtype: torch.dtype):
    """The transformers model of a directory. Raises CheckpointError for one that transformers cannot read, and
    NotImplementedError for one that cannot be a target."""
    config = _read_config(folder)
    _check(config)
    transformers.utils.logging.disable_progress_bar()
    return _made(lambda: transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True))


def load_hf_tensors(found: Checkpoint, dtype: torch.dtype, device: torch.device) -> HFTarget:
    """The model of a config and tensors that are in memory. Raises as load_hf."""
    kind = found.config["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"model_type {shown(kind)} needs a newer transformers than {transformers.__version__}")
    config = _config(lambda: transformers.AutoConfig.for_model(**found.config))
    _check(config)
    transformers.utils.logging.disable_progress_bar()
    made_by: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    model, report = _made(lambda: made_by.from_pretrained(None, config=config, state_dict=dict(found.tensors),
                                                          dtype=dtype, output_loading_info=True))
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):  # transformers would only warn
        if report[what]:
            raise CheckpointError(f"expected the tensors of a {kind} model; got {what.replace('_keys', '')} "
                                  f"{shown(sorted(map(str, report[what]))[0])}")
    return HFTarget(model.to(device))


def _check(config) -> None:
    """Raises NotImplementedError for a model that cannot be a target, before any of its weights is read."""
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise NotImplementedError(f"model_type {config.model_type!r} {_other_kind(config)}; a target must be a causal "
                                  "language model of text")
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            refuse_model(_made(lambda: transformers.AutoModelForCausalLM.from_config(config)))
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _read_config(folder: Path):
    kind = read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"model_type {shown(kind)} is unknown to transformers {transformers.__version__}; a "
                              "newer version may support it")
    return _config(lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True,
                                                                   trust_remote_code=False))


def _config(read):
    """Reads the config. For bad fields transformers raises many kinds of errors, including those of its validation
    libraries."""
    try:
        config = read()
    except Exception as error:
        raise CheckpointError(f"transformers {transformers.__version__} cannot read config.json: "
                              f"{brief(error)}") from error
    # What a file names there, transformers may fetch and run; attention is ours.
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = None
    return config


def _made(make):
    """Makes the model; errors as in _config."""
    try:
        return make()
    except NotImplementedError:
        raise
    except Exception as error:
        raise CheckpointError(f"transformers {transformers.__version__} cannot make the model: "
                              f"{brief(error)}") from error


def _other_kind(config) -> str:
    inner = [name for name in ("vision_config", "audio_config", "text_config") if getattr(config, name, None)]
    if inner:
        return f"is a multimodal model, with {inner[0]}"
    return "reads with an encoder" if config.is_encoder_decoder else "is not a causal language model"
