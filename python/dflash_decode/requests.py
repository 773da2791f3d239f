"""What goes into the loop and what comes out."""

import secrets
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace

from .kv import PagePool
from .sampling import GREEDY, Sampling, check_sampling


@dataclass(frozen=True)
class Request:
    """prompt: token ids. stop_tokens: generation ends after any of these. sampling: how tokens are drawn."""

    id: Hashable
    prompt: Sequence[int]
    max_new_tokens: int
    stop_tokens: Collection[int] = ()
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Event:
    """tokens: new ones, in order, a stop token included. finish: None while it goes on, else stop, length, cancelled or
    error. acceptance_lengths: with finish, the tokens that each step committed (prefill's one apart). seed: what the
    text is drawn with, so that it can be had again; None where nothing is drawn."""

    id: Hashable
    tokens: list[int]
    finish: str | None = None
    acceptance_lengths: tuple[int, ...] = ()
    error: str | None = None
    seed: int | None = None


@dataclass(eq=False)
class Live:
    """A request that waits or runs. sampling: the request's, with a seed; context: tokens in the target's cache; text:
    what it has emitted, the last of which is the anchor, not yet in the cache; limit: tokens that it may emit."""

    request: Request
    limit: int
    sampling: Sampling
    pages: list[int] = field(default_factory=list)
    context: int = 0
    text: list[int] = field(default_factory=list)
    acceptance: list[int] = field(default_factory=list)

    @property
    def anchor(self) -> int:
        return self.text[-1]

    @property
    def emitted(self) -> int:
        return len(self.text)

    def event(self, tokens: list[int], finish: str | None = None) -> Event:
        return Event(self.request.id, tokens, finish, tuple(self.acceptance) if finish else (),
                     seed=self.sampling.seed if self.sampling.temperature > 0 else None)


def admit(request: Request, vocab: int, max_context: int, pool: PagePool) -> Live:
    """The request, ready to wait. Raises ValueError, or TypeError, if it can never run."""
    check_sampling(request.sampling, f"request {request.id!r}", vocab)
    sampling = request.sampling
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(63) if sampling.temperature > 0 else 0)
    return Live(request, _limit(request, vocab, max_context, pool), sampling)


def _limit(request: Request, vocab: int, max_context: int, pool: PagePool) -> int:
    """How many tokens the request may emit."""
    what, n = f"request {request.id!r}", len(request.prompt)
    if n == 0:
        raise ValueError(f"{what}: prompt must have at least 1 token; got 0")
    bad = next((t for t in request.prompt if type(t) is not int or not 0 <= t < vocab), None)
    if bad is not None:
        raise ValueError(f"{what}: prompt must hold token ids in [0, {vocab}); got {bad!r}")
    if n >= max_context:
        raise ValueError(f"{what}: prompt must be shorter than the context of {max_context} tokens; got {n}")
    if type(request.max_new_tokens) is not int or request.max_new_tokens < 1:
        raise ValueError(f"{what}: max_new_tokens must be an integer of at least 1; got {request.max_new_tokens!r}")
    limit = min(request.max_new_tokens, max_context - n)
    if pool.pages_for(n + limit) > pool.num_pages:
        raise ValueError(f"{what}: prompt and answer must fit in {pool.num_pages} pages of {pool.page_size} tokens; "
                         f"got {n} + {limit} tokens")
    return limit
