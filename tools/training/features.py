"""Computes the target's features of each training text and stores them: hidden states at the target layers, and the
most likely next tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dflash_decode.checkpoint.tokenizer import Tokenizer

from .target import Target
from .texts import CONTEXT, chat_ids

TEACHER = 8  # most likely tokens kept for each position


class Features:
    """All texts end to end, N tokens: ids (N,), states (N, F * H) bfloat16 divided by scale (F * H,), likely and odds
    (N, TEACHER): the target's most likely tokens FOR this place and their probabilities. Text i is
    offsets[i]:offsets[i + 1], its answer begins at starts[i], greedy[i] tells whether it was written greedily."""

    def __init__(self, folder: Path):
        meta = json.loads((folder / "features.json").read_text())
        n, width = meta["tokens"], meta["width"]

        def array(name, dtype, *shape):
            return torch.from_numpy(np.memmap(folder / name, dtype=dtype, mode="r+", shape=shape))

        self.target_layer_ids, self.sources, self.prompts = (
            tuple(meta["target_layer_ids"]),
            meta["sources"],
            meta["prompts"],
        )
        self.ids, self.likely = array("ids", np.int32, n), array("likely", np.int32, n, TEACHER)
        self.states = array("states", np.int16, n, width).view(torch.bfloat16)
        self.odds = array("odds", np.float16, n, TEACHER)
        self.scale = torch.tensor(meta["scale"])
        self.offsets, self.starts, self.greedy = meta["offsets"], meta["starts"], meta["greedy"]

    def __len__(self) -> int:
        return len(self.starts)

    def length(self, i: int) -> int:
        return self.offsets[i + 1] - self.offsets[i]


def batches_of_like_lengths(coded: list[list[int]], rows: int) -> list[list[int]]:
    """The texts' indices by length, with about `rows` tokens in a batch when all are as long as its longest."""
    batches, batch = [], []
    for i in sorted(range(len(coded)), key=lambda i: len(coded[i])):
        if batch and (len(batch) + 1) * len(coded[i]) > rows:
            batches.append(batch)
            batch = []
        batch.append(i)
    return [*batches, batch]


def write_features(
    target: Target,
    tokenizer: Tokenizer,
    texts: Sequence[dict],
    target_layer_ids: Sequence[int],
    folder: Path,
    longest: int = CONTEXT,
    rows: int = 8192,
) -> Features:
    """Computes and stores the features of `texts`, each cut to `longest` tokens, about `rows` tokens at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    coded, starts = [], []
    for text in texts:
        prompt = chat_ids(tokenizer, text["prompt"], text.get("before", ()))
        ids = prompt + tokenizer.encode(text["answer"]) + list(tokenizer.stop_ids[:1]) * (text["finish"] == "stop")
        coded.append(ids[:longest])
        starts.append(len(prompt))
    kept = [i for i in range(len(texts)) if len(coded[i]) >= starts[i] + 2]
    coded, starts = [coded[i] for i in kept], [starts[i] for i in kept]
    offsets = np.concatenate(([0], np.cumsum([len(c) for c in coded]))).tolist()
    n, width = offsets[-1], len(target_layer_ids) * target.hidden

    def array(name, dtype, *shape):
        return np.memmap(folder / name, dtype=dtype, mode="w+", shape=shape)

    ids, states = array("ids", np.int32, n), array("states", np.int16, n, width)
    likely, odds = array("likely", np.int32, n, TEACHER), array("odds", np.float16, n, TEACHER)
    ids[:] = np.concatenate(coded)
    batches, scale = batches_of_like_lengths(coded, rows), None
    middle = batches.pop(len(batches) // 2)
    for batch in tqdm([middle, *batches], desc="features", unit="batch"):
        padded = torch.zeros((len(batch), max(len(coded[i]) for i in batch)), dtype=torch.long)
        for row, i in zip(padded, batch, strict=True):
            row[:len(coded[i])] = torch.tensor(coded[i])
        final, seen = target.forward(padded.to(target.device), target_layer_ids)
        seen = torch.cat(seen, -1)
        if scale is None:  # the first position is an attention sink with hidden states of another size
            scale = torch.cat([seen[r, 1:len(coded[i])] for r, i in enumerate(batch)]).float().pow(2).mean(0).sqrt()
            scale = scale.clamp_min(1e-3)
        seen = (seen / scale.to(seen.dtype)).cpu()
        for r, i in enumerate(batch):
            end, at = len(coded[i]), offsets[i]
            states[at:at + end] = seen[r, :end].contiguous().view(torch.int16).numpy()
            top = torch.softmax(F.linear(final[r, starts[i] - 1:end - 1], target.head), -1).topk(TEACHER)
            likely[at + starts[i]:at + end] = top.indices.cpu().numpy()
            odds[at + starts[i]:at + end] = top.values.float().cpu().numpy()
    for kept_array in (ids, states, likely, odds):
        kept_array.flush()
    (folder / "features.json").write_text(
        json.dumps(
            {
                "tokens": n,
                "width": width,
                "target_layer_ids": list(target_layer_ids),
                "scale": scale.tolist(),
                "offsets": offsets,
                "starts": starts,
                "greedy": [texts[i]["temperature"] == 0 for i in kept],
                "sources": [texts[i]["source"] for i in kept],
                "prompts": [texts[i]["prompt"] for i in kept],
            }
        )
    )
    return Features(folder)
