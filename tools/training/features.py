"""The target's features of training texts: hidden states at the target layers, and the most likely next tokens.

They are stored once, or computed again whenever a text is visited. Storing takes 2 F * H bytes of disk a token, and
saves the target's pass over the texts of every step.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dflash_decode.checkpoint.tokenizer import Tokenizer

from .target import Target
from .texts import CONTEXT, coded

TEACHER = 8  # most likely tokens kept for each position


class Padded(NamedTuple):
    """B texts, padded on the right: ids (B, T) int64, states (B, T, F * H) bfloat16 divided by the scale, likely and
    odds (B, T, TEACHER): the target's most likely tokens FOR a place, and their probabilities; of answers alone."""

    ids: torch.Tensor
    states: torch.Tensor
    likely: torch.Tensor
    odds: torch.Tensor


class Texts(ABC):
    """All texts end to end, N tokens: ids (N,) int32. Text i is offsets[i]:offsets[i + 1], its answer begins at
    starts[i], greedy[i] tells whether it was written greedily. scale (F * H,): the size of the states' elements.
    digest: of the conversations. longest: texts are cut to so many tokens."""

    ids: torch.Tensor
    offsets: list[int]
    starts: list[int]
    greedy: list[bool]
    sources: list[str]
    prompts: list[str]
    scale: torch.Tensor
    target_layer_ids: tuple[int, ...]
    digest: str
    longest: int

    def __len__(self) -> int:
        return len(self.starts)

    def length(self, i: int) -> int:
        return self.offsets[i + 1] - self.offsets[i]

    def text(self, i: int) -> torch.Tensor:
        return self.ids[self.offsets[i]:self.offsets[i + 1]]

    def padded_ids(self, which: Sequence[int]) -> torch.Tensor:
        return padded([self.text(i) for i in which])

    def take_scale(self, scale: torch.Tensor) -> bool:
        """Divides the states by this scale from now on, if that is possible or nothing else."""
        return torch.equal(self.scale, scale)

    @abstractmethod
    def batch(self, which: Sequence[int]) -> Padded:
        """Texts as a batch."""


class Coded(NamedTuple):
    """Texts as tokens, cut to a length: those that have an answer then."""

    ids: list[list[int]]
    starts: list[int]
    greedy: list[bool]
    sources: list[str]
    prompts: list[str]

    def offsets(self) -> list[int]:
        return [0, *accumulate(map(len, self.ids))]


def code(tokenizer: Tokenizer, texts: Sequence[dict], longest: int = CONTEXT) -> Coded:
    found = Coded([], [], [], [], [])
    for text in texts:
        whole, start = coded(tokenizer, text)
        if len(ids := whole[:longest]) >= start + 2:
            row = ids, start, text["temperature"] == 0, text["source"], text["prompt"]
            for column, value in zip(found, row, strict=True):
                column.append(value)
    return found


def digest_of(texts: Sequence[dict]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(json.dumps(text, sort_keys=True, ensure_ascii=False).encode())
    return found.hexdigest()[:24]


def padded(texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, T) int64."""
    return torch.nn.utils.rnn.pad_sequence([ids.long() for ids in texts], batch_first=True)


def run(target: Target, ids: torch.Tensor, target_layer_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T) -> the final hidden states (B, T, H), and the layers' beside each other (B, T, F * H)."""
    final, seen = target.forward(ids.to(target.device), target_layer_ids)
    return final, torch.cat(seen, -1)


def scale_of(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """states (B, T, F * H). The first position is an attention sink with hidden states of another size."""
    rows = torch.cat([states[r, 1:n] for r, n in enumerate(lengths)])
    return rows.float().pow(2).mean(0).sqrt().clamp_min(1e-3)


class LiveTexts(Texts):
    """Texts whose features the target computes when they are asked for. sample: texts that the scale is taken from."""

    def __init__(self, target: Target, tokenizer: Tokenizer, texts: Sequence[dict], target_layer_ids: Sequence[int],
                 longest: int = CONTEXT, sample: int = 16):
        found = code(tokenizer, texts, longest)
        self.target, self.target_layer_ids, self.digest = target, tuple(target_layer_ids), digest_of(texts)
        self.longest = longest
        self.ids = torch.tensor([token for ids in found.ids for token in ids], dtype=torch.int32)
        self.offsets, self.starts, self.greedy = found.offsets(), found.starts, found.greedy
        self.sources, self.prompts = found.sources, found.prompts
        some = list(range(len(self)))[::max(len(self) // sample, 1)][:sample]
        states = run(target, self.padded_ids(some), self.target_layer_ids)[1]
        self.scale = scale_of(states, [self.length(i) for i in some]).cpu()

    def take_scale(self, scale: torch.Tensor) -> bool:
        self.scale = scale
        return True

    @torch.no_grad()
    def batch(self, which: Sequence[int]) -> Padded:
        ids = self.padded_ids(which)
        final, states = run(self.target, ids, self.target_layer_ids)
        states = states / self.scale.to(states)
        # The tokens for a place come from the row before it, for all places of the answers.
        places = torch.arange(ids.shape[1])
        inside = (places >= torch.tensor([self.starts[i] for i in which])[:, None]) & (
            places < torch.tensor([self.length(i) for i in which])[:, None])
        row, place = (at.to(final.device) for at in inside.nonzero(as_tuple=True))
        likely = torch.zeros((*ids.shape, TEACHER), dtype=torch.int64, device=final.device)
        odds = torch.zeros((*ids.shape, TEACHER), device=final.device)
        found = self.target.likely(final[row, place - 1], TEACHER)
        likely[row, place], odds[row, place] = found[0], found[1].float()
        return Padded(ids, states, likely, odds)


class Features(Texts):
    """Stored features, of all texts end to end: states (N, F * H), likely and odds (N, TEACHER)."""

    def __init__(self, folder: Path):
        meta = json.loads((folder / "features.json").read_text())
        n, width = meta["tokens"], meta["width"]

        def array(name, dtype, *shape):
            return torch.from_numpy(np.memmap(folder / name, dtype=dtype, mode="r+", shape=shape))

        self.target_layer_ids, self.sources, self.prompts = (
            tuple(meta["target_layer_ids"]), meta["sources"], meta["prompts"])
        self.ids, self.likely = array("ids", np.int32, n), array("likely", np.int32, n, TEACHER)
        self.states = array("states", np.int16, n, width).view(torch.bfloat16)
        self.odds = array("odds", np.float16, n, TEACHER)
        self.scale, self.digest, self.longest = torch.tensor(meta["scale"]), meta["digest"], meta["longest"]
        self.offsets, self.starts, self.greedy = meta["offsets"], meta["starts"], meta["greedy"]

    def batch(self, which: Sequence[int]) -> Padded:
        shape = len(which), max(self.length(i) for i in which)
        found = Padded(self.padded_ids(which), self.states.new_zeros(*shape, self.states.shape[1]),
                       torch.zeros((*shape, TEACHER), dtype=torch.int64), torch.zeros((*shape, TEACHER)))
        for r, i in enumerate(which):
            at = slice(self.offsets[i], self.offsets[i + 1])
            for into, stored in zip(found[1:], (self.states, self.likely, self.odds), strict=True):
                into[r, :self.length(i)] = stored[at]
        return found


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
    target: Target, tokenizer: Tokenizer, texts: Sequence[dict], target_layer_ids: Sequence[int], folder: Path,
    longest: int = CONTEXT, rows: int = 8192,
) -> Features:
    """Computes and stores the features of `texts`, each cut to `longest` tokens, about `rows` tokens at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    found = code(tokenizer, texts, longest)
    coded_ids, starts, offsets = found.ids, found.starts, found.offsets()
    n, width = offsets[-1], len(target_layer_ids) * target.hidden

    def array(name, dtype, *shape):
        return np.memmap(folder / name, dtype=dtype, mode="w+", shape=shape)

    ids, states = array("ids", np.int32, n), array("states", np.int16, n, width)
    likely, odds = array("likely", np.int32, n, TEACHER), array("odds", np.float16, n, TEACHER)
    ids[:] = np.concatenate(coded_ids)
    batches, scale = batches_of_like_lengths(coded_ids, rows), None
    middle = batches.pop(len(batches) // 2)
    for batch in tqdm([middle, *batches], desc="features", unit="batch"):
        final, seen = run(target, padded([torch.tensor(coded_ids[i]) for i in batch]), target_layer_ids)
        if scale is None:
            scale = scale_of(seen, [len(coded_ids[i]) for i in batch])
        seen = (seen / scale.to(seen.dtype)).cpu()
        for r, i in enumerate(batch):
            end, at = len(coded_ids[i]), offsets[i]
            states[at:at + end] = seen[r, :end].contiguous().view(torch.int16).numpy()
            tokens, shares = target.likely(final[r, starts[i] - 1:end - 1], TEACHER)
            likely[at + starts[i]:at + end], odds[at + starts[i]:at + end] = tokens.cpu(), shares.float().cpu()
    for kept_array in (ids, states, likely, odds):
        kept_array.flush()
    (folder / "features.json").write_text(json.dumps({
        "tokens": n, "width": width, "target_layer_ids": list(target_layer_ids), "scale": scale.tolist(),
        "offsets": offsets, "starts": starts, "greedy": found.greedy, "sources": found.sources,
        "prompts": found.prompts, "digest": digest_of(texts), "longest": longest}))
    return Features(folder)
