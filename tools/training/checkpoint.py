"""Writes the trained drafter: z-lab's config.json and safetensors, and a record of the run."""

import gzip
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save

from dflash_decode.cache import write_whole

from .drafter import TrainedDrafter
from .target import Target


def write(folder: Path, drafter: TrainedDrafter, target: Target, vocabulary: torch.Tensor,
          shard_mb: float | None = None) -> None:
    """Writes config.json, model.safetensors (or shards with an index) and draft_vocabulary.json: the ids of the trained
    tokens, which our loop uses as the rows of the draft head. Other readers ignore it. Each file is whole at any time.
    What there was of other weights is removed, a selector and its calibration included."""
    write_whole(folder / "config.json", json.dumps(drafter.shape.config(target), indent=2) + "\n")
    tensors, kept = drafter.tensors(), {"format": "pt"}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        size = sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes
        if shard_mb and shards[-1] and size > shard_mb * 1_000_000:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for stale in folder.glob("model*.safetensors*"):
        if stale.name not in files:
            stale.unlink()
    for file, shard in zip(files, shards, strict=True):
        data, old = save(shard, kept), folder / file
        if not old.is_file() or old.read_bytes() != data:
            shutil.rmtree(folder / "candidate_selector", ignore_errors=True)
            (folder / "calibration.json").unlink(missing_ok=True)
            write_whole(old, data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard}}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_whole(folder / "draft_vocabulary.json", json.dumps({"token_ids": vocabulary.tolist()}) + "\n")


def kept_with(checkpoint: Path | None, name: str) -> Path | None:
    """A file of a checkpoint's record: in its folder, or in the one above, as in a drafter's package."""
    found = (folder / name for folder in (checkpoint, checkpoint.absolute().parent)) if checkpoint else ()
    return next((file for file in found if file.is_file()), None)


def read_prompts(checkpoint: Path | None) -> set[str]:
    """The prompts that a checkpoint was trained on; none if it has no record."""
    file = kept_with(checkpoint, "training_prompts.json.gz")
    return set(json.loads(gzip.decompress(file.read_bytes()))) if file else set()


def write_prompts(folder: Path, prompts: Iterable[str], start: Path | None) -> None:
    """Writes training_prompts.json.gz: every prompt of the run and of the checkpoint that it started from."""
    every = json.dumps(sorted(set(prompts) | read_prompts(start)), ensure_ascii=False, indent=0)
    write_whole(folder / "training_prompts.json.gz", gzip.compress(every.encode(), mtime=0))


def write_record(folder: Path, training, start: Path | None) -> None:
    """Writes training.json: the recipe, the data and the progress of the run, and under "start" those of the checkpoint
    that it started from."""
    features = training.features
    answered = sum(features.length(i) - features.starts[i] for i in training.used)
    record = {"recipe": asdict(training.recipe), "shape": asdict(training.drafter.shape), "texts": len(training.used),
              "held_out": len(training.held_out), "answer_tokens": answered, "steps": training.step,
              "minutes": training.seconds / 60, "device": training.device_name(), "history": training.history}
    if before := kept_with(start, "training.json"):
        record["start"] = json.loads(before.read_text())
    write_whole(folder / "training.json", json.dumps(record, indent=1) + "\n")
