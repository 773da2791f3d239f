"""Measures what passes of a loop cost, and says what that depends on."""

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from dflash_kernels import build_info

from .costs import Times, pass_sizes
from .packed import DraftStage, VerifyStage
from .runner import Setting, bucket, buckets
from .verify import GreedyVerifier
from .widths import draft_widths

_ROUNDS, _ENOUGH = 4, 0.05  # times that a pass is measured, unless they take so many seconds
_APART = 7919  # a prime: ids of tokens that have nothing to do with each other


class Stages(Protocol):
    """Whose passes are measured: PackedRunner."""

    setting: Setting
    longest: int  # tokens of a block

    def most_rows(self, batch: int) -> int: ...

    def verify_stage(self, requests: int, rows: int, width: int, kind: type[GreedyVerifier]) -> VerifyStage: ...

    def draft_stage(self, requests: int, width: int) -> DraftStage: ...


def identity(runner: Stages) -> dict:
    """All that the costs depend on."""
    s, facts = runner.setting, build_info()
    machine = {name: facts[name] for name in ("version", "sources", "torch", "cpu", "isa", "threads", "compiler")}
    return {**machine, "target": _shape(s.target), "drafter": _shape(s.drafter), "block": s.width,
            "longest": runner.longest, "batch": s.max_batch}


def _shape(model) -> list:
    """Sizes that tell a model's work from another's."""
    cache = model.cache
    return [type(model).__name__, cache.layers, cache.kv_heads, cache.head_dim, str(model.dtype),
            bool(getattr(model, "int8", False)), getattr(model.head, "format", None),
            getattr(model.head, "exact", False), list(model.embedding.shape),
            getattr(getattr(model, "geometry", None), "intermediate", 0),
            repr(getattr(getattr(model, "geometry", None), "experts", None))]


def measure(runner: Stages, few: bool) -> Times:
    """Seconds of passes over requests without a context, in rounds, as other work on the machine comes and goes.

    few: only of passes that `PackedRunner.ready` records, in one round.
    """
    works = _passes(runner, few)
    for work in works.values():
        work()
    found: Times = {"verify": {}, "draft": {}}
    spent = dict.fromkeys(works, 0.0)
    for _ in range(1 if few else _ROUNDS):
        for (part, size), work in works.items():
            if spent[part, size] < _ENOUGH:
                started = time.perf_counter()
                work()
                seconds = time.perf_counter() - started
                spent[part, size] += seconds
                found[part][size] = min(seconds, found[part].get(size, seconds))
    return found


def _measured_rows(most: int) -> set[int]:
    """Every number up to 8, as kernels take so many rows at once and another number of them in two groups, then every
    second size of a pass, two an octave, and the most."""
    sizes = pass_sizes(most)
    return {*sizes[:8], *sizes[9::2], most}


def _passes(runner: Stages, few: bool) -> dict[tuple[str, int], Callable[[], object]]:
    s, most = runner.setting, runner.most_rows(bucket(runner.setting.max_batch))
    works: dict[tuple[str, int], Callable[[], object]] = {}
    for rows in sorted(_measured_rows(most)):
        if not few or rows <= max(s.width, 2 * s.max_batch):
            stage = runner.verify_stage(min(-(-rows // s.width), s.max_batch), rows, runner.longest, GreedyVerifier)
            stage.fill([])
            # Rows of one token would go through the same experts, and read the weights of a single row.
            stage.ids.set([i * _APART % s.target.vocab_size for i in range(stage.ids.tensor.numel())])
            works["verify", rows] = stage
    sizes = [(1, width) for width in draft_widths(s.width)] + [(n, s.width) for n in buckets(s.max_batch)]
    for batch, width in sizes:
        if not few or batch == 1:
            works["draft", batch * width] = partial(runner.draft_stage(batch, width), [], [])
    return works
