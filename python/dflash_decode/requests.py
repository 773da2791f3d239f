"""Requests to the decoding loop, and its events."""

import secrets
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from .arguments import of_type, whole
from .inputs import integer, is_token_list, items, shown
from .kv import PagePool
from .logprobs import TokenLogprobs
from .lookup import Draft, Lookup
from .policy import Outlook
from .sampling import GREEDY, SamplingParams, check_sampling

if TYPE_CHECKING:  # a machine with a GPU may have no NumPy
    import numpy as np


@dataclass(frozen=True)
class Request:
    """A request to decode one prompt. All fields are read when it is submitted.

    id: any hashable value that no running request has.
    prompt: token ids, as a sequence or a tensor or array of one dimension.
    max_tokens: the maximum length of the answer. The end of the context ends it earlier.
    stop_tokens: the answer ends after any of these.
    sampling: the sampling parameters; greedy by default.
    logprobs: how many of the most likely tokens the events name with each token, from 0 on; None: none are computed.
    cache_salt: K/V are reused among requests of the same one alone, so that nobody else can tell by the time of an
        answer what was asked before. The output does not change.
    """

    id: Hashable
    prompt: Sequence[int]
    max_tokens: int
    stop_tokens: Collection[int] = ()
    sampling: SamplingParams = GREEDY
    logprobs: int | None = None
    cache_salt: str = ""


@dataclass(frozen=True)
class Event:
    """New tokens of a request, or its end.

    tokens: the new tokens in order, including a stop token.
    finish: None while the request runs, else "stop", "length", "cancelled" or "error".
    acceptance_lengths: at the end, the tokens that each step committed, without the one of the prefill.
    widths: likewise, the tokens of the block that each step verified.
    error: the message, where finish is "error".
    seed: the seed that reproduces the output; None for greedy requests.
    logprobs: one for each token, of a request that asks for them.
    cached_tokens: tokens of the prompt whose K/V an earlier request had written.
    """

    id: Hashable
    tokens: list[int]
    finish: str | None = None
    acceptance_lengths: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    error: str | None = None
    seed: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0


class Features(NamedTuple):
    """Hidden states (n, F * H) of committed tokens from `position` on, as `packed.bits_of` has them."""

    position: int
    rows: "np.ndarray"


@dataclass(eq=False)
class Live:
    """A waiting or running request.

    request: the request in Python values. sampling: its parameters, with a seed. limit: the most tokens it can emit.
    told: the number of tokens that its events have reported. prefilled: the tokens of the prompt in the target's cache,
    of which it found `cached` there.
    features: of tokens from a position on, which the drafter's context lacks. outlook: what is known of its drafts.
    lookup: prompt and answer, as far as drafts were looked up in them. wary: its grammar has raised at a draft, and is
    asked about no more of them.

    `take` commits the tokens of a step with one append, so an interrupt leaves all of them or none.
    """

    request: Request
    limit: int
    sampling: SamplingParams
    pages: list[int] = field(default_factory=list)
    told: int = 0
    prefilled: int = 0
    cached: int = 0
    features: list[Features] = field(default_factory=list)
    outlook: Outlook = field(default_factory=Outlook)
    lookup: Lookup = field(default_factory=Lookup)
    wary: bool = False
    ended: str | None = None  # set from outside: cancelled or error
    error: str | None = None
    _tokens: list[int] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)  # the number of tokens after the prefill and after each step
    _widths: list[int] = field(default_factory=list)  # tokens of the blocks that were verified
    _logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each token, if they are asked for

    def take(self, tokens: Sequence[int], width: int = 1, logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Commits the tokens of the prefill or of a step, whose block had `width` tokens."""
        done = self.emitted
        self._tokens[done:] = tokens
        self._logprobs[done:] = logprobs
        self._widths[len(self._ends):] = [width]
        self._ends.append(done + len(tokens))

    def fail(self, why: str) -> None:
        """Ends the request with an error."""
        self.error = f"request {shown(self.request.id)}: {why}"
        self.ended = "error"

    @property
    def room(self) -> int:
        """The most tokens that its next step can commit."""
        return 1 if self.wary else self.limit - self.emitted

    @property
    def emitted(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def text(self) -> list[int]:
        return self._tokens[:self.emitted]

    @property
    def anchor(self) -> int:
        """The last token, which is not yet in the target's cache."""
        return self._tokens[self.emitted - 1]

    @property
    def context(self) -> int:
        """The number of tokens in the target's cache after the prefill."""
        return len(self.request.prompt) + self.emitted - 1

    @property
    def cache(self) -> list[int]:
        """The tokens in the target's cache after the prefill."""
        return [*self.request.prompt, *self._tokens[:self.emitted - 1]]

    def looked_up(self, most: int) -> Draft:
        """Up to so many drafts from the text itself."""
        prompt, known = self.request.prompt, len(self.lookup.tokens)
        if known < len(prompt):
            self.lookup.read(prompt[known:])
        self.lookup.read(self._tokens[max(known - len(prompt), 0):self.emitted])
        return self.lookup.draft(most)

    @property
    def finish(self) -> str | None:
        if self.ended or not self._ends:
            return self.ended
        emitted = self._ends[-1]  # looked at many times in a step
        stops = self._tokens[emitted - 1] in self.request.stop_tokens
        return "stop" if stops else "length" if emitted >= self.limit else None

    @property
    def has_news(self) -> bool:
        return self.finish is not None or self.told < self.emitted

    def event(self) -> Event:
        """The event of everything that is not reported yet."""
        finish, tokens = self.finish, self._tokens[self.told:self.emitted]
        done = len(self._ends) if finish else 0
        return Event(self.request.id, tokens, finish, tuple(b - a for a, b in pairwise(self._ends[:done])),
                     tuple(self._widths[1:done]), self.error,
                     self.sampling.seed if self.sampling.temperature > 0 else None,
                     tuple(self._logprobs[self.told:self.emitted]), self.cached)


def admit(request: Request, vocab: int, max_context: int, pool: PagePool) -> Live:
    """The checked request, ready to be queued. Raises ValueError or TypeError if it can never run."""
    if not isinstance(request, Request):
        raise TypeError(f"request must be a Request; got {shown(request)}")
    what = f"request {shown(request.id)}"
    try:
        hash(request.id)
    except TypeError:
        raise TypeError(f"{what}: id must be hashable; got a {type(request.id).__name__}") from None
    sampling = check_sampling(request.sampling, what, vocab)
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(63) if sampling.temperature > 0 else 0)
    prompt, stops = _prompt(request, vocab, max_context, what), _stops(request, vocab, what)
    limit = whole(what, "max_tokens", request.max_tokens, 1)
    logprobs = None if request.logprobs is None else whole(what, "logprobs", request.logprobs, 0, vocab)
    of_type(what, "cache_salt", request.cache_salt, str, "a text")
    limit, n = min(limit, max_context - len(prompt)), len(prompt)
    if pool.pages_for(n + limit) > pool.num_pages:
        raise ValueError(f"{what}: prompt and answer must fit in {pool.num_pages} pages of {pool.page_size} tokens; "
                         f"got {n} + {limit} tokens")
    return Live(replace(request, prompt=prompt, stop_tokens=stops, sampling=sampling, logprobs=logprobs), limit,
                sampling)


def _prompt(request: Request, vocab: int, max_context: int, what: str) -> list[int]:
    given = request.prompt
    if not is_token_list(given):
        raise TypeError(f"{what}: prompt must be a sequence of token ids, or a tensor or array of one dimension; "
                        f"got {shown(given)}")
    if len(given) == 0:
        raise ValueError(f"{what}: prompt must have at least 1 token; got 0")
    if len(given) >= max_context:
        raise ValueError(f"{what}: prompt must be shorter than the context of {max_context} tokens; got {len(given)}")
    found = items(given)
    ids = []
    for given_token in found:
        token = integer(given_token)
        if token is None or not 0 <= token < vocab:
            raise (TypeError if token is None else ValueError)(
                f"{what}: prompt must hold token ids in [0, {vocab}); got {shown(given_token)}")
        ids.append(token)
    return ids


def _stops(request: Request, vocab: int, what: str) -> frozenset[int]:
    given = request.stop_tokens
    if not is_token_list(given, ordered=False):
        raise TypeError(f"{what}: stop_tokens must be a collection of token ids; got {shown(given)}")
    if len(given) > vocab:
        raise ValueError(f"{what}: stop_tokens must be at most the vocabulary's {vocab}; got {len(given)}")
    found = items(given)
    stops = set()
    for given_token in found:
        token = integer(given_token)
        if token is None:
            raise TypeError(f"{what}: stop_tokens must hold token ids; got {shown(given_token)}")
        stops.add(token)
    return frozenset(stops)
