"""What goes into the loop and what comes out."""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from .kv import PagePool


@dataclass(frozen=True)
class Request:
    """prompt: token ids. stop_tokens: generation ends after any of these."""

    id: Hashable
    prompt: Sequence[int]
    max_new_tokens: int
    stop_tokens: Collection[int] = ()


@dataclass(frozen=True)
class Event:
    """tokens: new ones, in order, a stop token included. finish: None while it goes on, else stop, length, cancelled or
    error. acceptance_lengths: with finish, the tokens that each step committed (prefill's one apart)."""

    id: Hashable
    tokens: list[int]
    finish: str | None = None
    acceptance_lengths: tuple[int, ...] = ()
    error: str | None = None


@dataclass(eq=False)
class Live:
    """A request that waits or runs. context: tokens in the target's cache; anchor: the one after them; limit: tokens
    that it may emit."""

    request: Request
    limit: int
    pages: list[int] = field(default_factory=list)
    context: int = 0
    anchor: int = -1
    emitted: int = 0
    acceptance: list[int] = field(default_factory=list)


def check_request(request: Request, vocab: int, max_context: int, pool: PagePool) -> int:
    """How many tokens the request may emit. Raises ValueError, or TypeError, if it can never run."""
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
