"""Restricts answers to a JSON schema or a regular expression, with llguidance."""

import json
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from ..checkpoint.errors import brief
from ..checkpoint.tokenizer import Tokenizer
from ..extras import how_to_get
from ..inputs import said, shown, within
from ..sampling import Grammar

# Characters of a schema or an expression, and the stack of the thread that compiles it: llguidance follows references
# by recursion, and what is too deep for its thread ends the process. A chain of references in a text of this length
# takes a quarter of this stack.
_LONGEST, _STACK = 1 << 18, 256 << 20
COMPILED = ("json_schema", "regex")  # the fields of GenerationParams that ask for one
_Found = TypeVar("_Found")
_here = threading.local()  # deep: whether this is a thread that compiles


class Constraint:
    """A grammar of llguidance. Its matcher is kept where the last answer that it saw ended, and moved from there.

    make: makes a matcher that shares nothing with others; copies of one share what it can run out of, so that the
    drafts of one answer would fail another. stops: tokens that end an answer.
    """

    def __init__(self, make: Callable[[], Any], stops: Collection[int], matcher: Any = None):
        self._make, self._stops = make, stops
        self._matcher, self._tokens, self._failed = matcher or make(), list[int](), 0

    def fresh(self) -> "Constraint":
        """One for another answer."""
        return Constraint(self._make, self._stops)

    def fill_bitmask(self, tokens: Sequence[int], words: torch.Tensor) -> None:
        if self._failed == 1 and self._matcher.is_error():
            # Drafts were too much for it, and not the answer, which goes on. It is asked about no more drafts
            # (AdjustedVerifier), so it can fail again with the answer alone.
            self._matcher, self._tokens = self._make(), []
        # An answer that goes on behind its end stays ended, and only stop tokens may follow.
        end = next((i for i, token in enumerate(tokens) if token in self._stops), len(tokens))
        self._move_to(tokens[:end])
        if end < len(tokens) and not self._matcher.is_stopped():
            self._consume(tokens[end:end + 1])
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        if self._matcher.is_error():  # also where the mask was too much to compute, which then has stop tokens alone
            self._failed += 1
            raise ValueError(self._matcher.get_error())

    def _move_to(self, tokens: Sequence[int]) -> None:
        same = next((i for i, (a, b) in enumerate(zip(tokens, self._tokens, strict=False)) if a != b),
                    min(len(tokens), len(self._tokens)))
        if same < len(self._tokens):
            self._matcher.rollback(len(self._tokens) - same)
            del self._tokens[same:]
        if same < len(tokens):
            self._consume(tokens[same:])

    def _consume(self, tokens: Sequence[int]) -> None:
        self._matcher.consume_tokens(list(tokens))
        self._tokens += tokens


class MinTokens:
    """Keeps the stop tokens out of the first tokens of an answer that `grammar`, if any, restricts. What the grammar
    has brought to its end, ends."""

    def __init__(self, grammar: Grammar | None, least: int, stop_tokens: Collection[int]):
        self._grammar, self._least, self._stops = grammar, least, stop_tokens

    def fill_bitmask(self, tokens: Sequence[int], words: torch.Tensor) -> None:
        if self._grammar is not None:
            self._grammar.fill_bitmask(tokens, words)
        if len(tokens) < self._least:
            kept = words.tolist()
            for stop in self._stops:  # which the vocabulary has
                kept[stop // 32] &= ~(1 << stop % 32) if stop % 32 < 31 else 0x7FFFFFFF
            if any(kept):
                words.copy_(torch.tensor(kept, dtype=words.dtype))


class Constraints:
    """Compiles grammars for one tokenizer, one after the other in a thread of its own. Each is compiled anew, mostly in
    a millisecond: what one request makes a matcher remember is no other's. It can be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self._tokenizer, self._vocab = tokenizer, vocab
        self._stops = within(tokenizer.stop_ids, vocab)
        self._lock, self._library_s = threading.Lock(), None
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[..., _Found], *args: object) -> "Future[_Found]":
        """work(*args) in the thread that compiles, so that a caller need not block another one until it is free."""
        with self._large_stacks():
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "dflash-grammars", lambda: setattr(_here, "deep", True))
                weakref.finalize(self, self._thread.shutdown, wait=False)
            return self._thread.submit(work, *args)  # starts the thread, the first time

    @contextmanager
    def _large_stacks(self) -> Iterator[None]:
        """Of threads that start inside."""
        with self._lock:
            size = threading.stack_size(_STACK)
            try:
                yield
            finally:
                threading.stack_size(size)

    def grammar(self, what: str, json_schema: object, regex: object, grammar: Grammar | None) -> Grammar | None:
        """The grammar that these ask for, at most one of them. Raises TypeError, ValueError, and ModuleNotFoundError
        where llguidance is needed and missing."""
        given = {name: value for name, value in (("json_schema", json_schema), ("regex", regex), ("grammar", grammar))
                 if value is not None}
        if len(given) > 1:
            raise ValueError(f"{what}: the answer must be restricted by at most one of json_schema, regex and grammar; "
                             f"got {' and '.join(given)}")
        if regex is not None:
            if not isinstance(regex, str):
                raise TypeError(f"{what}: regex must be a text; got {shown(regex)}")
            return self._compiled(what, "regex", regex)
        if json_schema is not None:
            return self._compiled(what, "json_schema", _schema(what, json_schema))
        return grammar

    def _compiled(self, what: str, kind: str, text: str) -> Constraint:
        try:
            import llguidance
        except ImportError:
            raise ModuleNotFoundError(f"{what}: {kind} needs the package llguidance: {how_to_get('grammar')}") from None
        if len(text) > _LONGEST:
            raise ValueError(f"{what}: {kind} must have at most {_LONGEST:,} characters; got {len(text):,}")
        if getattr(_here, "deep", False):
            return self._made(llguidance, what, kind, text)
        return self.submit(self._made, llguidance, what, kind, text).result()

    def _deep(self, work: Callable[[], _Found]) -> _Found:
        """work() where the stack is large enough: in a thread of its own, as the one that compiles may be busy."""
        if getattr(_here, "deep", False):
            return work()
        found: Future[_Found] = Future()

        def run() -> None:
            try:
                found.set_result(work())
            except BaseException as error:
                found.set_exception(error)

        with self._large_stacks():
            threading.Thread(target=run, name="dflash-grammar", daemon=True).start()
        return found.result()

    def _made(self, llguidance: Any, what: str, kind: str, text: str) -> Constraint:
        grammar = getattr(llguidance.LLMatcher, f"grammar_from_{kind}")(text)
        make = partial(llguidance.LLMatcher, self._library(llguidance), grammar, log_level=0)
        if (matcher := make()).is_error():
            raise ValueError(f"{what}: {kind} must be one that llguidance {llguidance.__version__} can follow; "
                             f"got {shown(text)}: {brief(matcher.get_error())}")
        return Constraint(partial(self._deep, make), self._stops, matcher)

    def _library(self, llguidance: Any) -> Any:
        """The library's view of the tokenizer, which takes about a second to make."""
        if self._library_s is None:
            self._library_s = llguidance.LLTokenizer(self._tokenizer.backend.to_str(), n_vocab=self._vocab,
                                                     eos_token=self._stops)
        return self._library_s


def _schema(what: str, given: Any) -> str:
    """The text of a JSON schema."""
    of_pydantic = getattr(given, "model_json_schema", None)
    if callable(of_pydantic):
        given = of_pydantic()
    try:
        found = json.loads(given) if isinstance(given, str) else given
        if isinstance(found, Mapping):
            return json.dumps(dict(found))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{what}: json_schema must be a JSON schema; got {shown(given)}: {said(error)}") from None
    raise TypeError(f"{what}: json_schema must be a dict, a JSON text or a pydantic model; got {shown(given)}")
