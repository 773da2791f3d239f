"""Reads a Hugging Face directory: config.json and memory-mapped safetensors."""

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError, brief, read_json, regular
from .fields import shown

MASK_EMBEDDING = "mask_embedding.safetensors"  # lies beside a drafter's weights
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A model's Hugging Face config, its tensors under their Hugging Face names, and their source."""

    config: dict
    tensors: Mapping[str, torch.Tensor]
    source: str

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> torch.Tensor:
        """The tensor `name`, checked against `shape`. Raises CheckpointError if it is missing or has another shape."""
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.source}: expected a tensor {name}; got none of that name "
                                  f"among {len(self.tensors)}")
        if shape is not None and tuple(found.shape) != tuple(shape):
            raise CheckpointError(f"{self.source}: {name} must have shape {tuple(shape)}; got {tuple(found.shape)}")
        return found


def read_directory(folder: Path) -> Checkpoint:
    """The checkpoint in a Hugging Face directory, with its tensors memory-mapped."""
    config = read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if os.path.lexists(single):
        return Checkpoint(config, read_safetensors(single), str(folder))
    if os.path.lexists(index):
        return Checkpoint(config, _read_shards(folder, index), str(folder))
    shards = sorted(file for file in folder.glob("*.safetensors") if file.name != MASK_EMBEDDING)
    if len(shards) == 1:
        return Checkpoint(config, read_safetensors(shards[0]), str(folder))
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    got = f"only pickles ({', '.join(pickles[:3])}), which can run code and are not read; convert them to safetensors" \
        if pickles and not shards else f"{len(shards)} .safetensors files and no index" if shards else "no weights"
    raise CheckpointError(f"{folder}: expected model.safetensors or model.safetensors.index.json; got {got}")


def read_safetensors(file: Path, wanted: Set[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, memory-mapped: those that are `wanted`, or all."""
    from safetensors import safe_open  # here: a drafter of random weights needs no such package

    regular(file)
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names if wanted is None or name in wanted}
    except Exception as error:  # the library's own, and what torch raises for a dtype that it lacks
        raise CheckpointError(f"{file}: expected a safetensors file; got {brief(error)}") from None


def _read_shards(folder: Path, index: Path) -> dict[str, torch.Tensor]:
    """Reads each tensor from the file that the index names for it, and ignores the other tensors of a shard. Other
    loaders read those too, and the last file wins."""
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
                              f"the first is {missing[0]} (listed in {where[missing[0]]})")
    return tensors
