"""Restricts answers to a JSON schema or a regular expression, with llguidance."""

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from threading import Lock
from typing import Any

import torch

from ..checkpoint.errors import brief
from ..checkpoint.tokenizer import Tokenizer
from ..inputs import said, shown
from ..sampling import Grammar

_MOST_KEPT = 32  # compiled grammars


class Constraint:
    """A grammar of llguidance. Its matcher is kept where the last answer that it saw ended, and moved from there."""

    def __init__(self, matcher: Any, tokens: Sequence[int] = ()):
        self._matcher, self._tokens = matcher, [*tokens]

    def fresh(self) -> "Constraint":
        """One for another answer."""
        return Constraint(self._matcher.deep_copy(), self._tokens)

    def fill_bitmask(self, tokens: Sequence[int], words: torch.Tensor) -> None:
        same = next((i for i, (a, b) in enumerate(zip(tokens, self._tokens, strict=False)) if a != b),
                    min(len(tokens), len(self._tokens)))
        if same < len(self._tokens):
            self._matcher.rollback(len(self._tokens) - same)
            del self._tokens[same:]
        new = list(tokens[same:])
        if new:
            self._matcher.consume_tokens(new)
            self._tokens += new
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())


class MinTokens:
    """Keeps the stop tokens out of the first tokens of an answer that `grammar`, if any, restricts."""

    def __init__(self, grammar: Grammar | None, least: int, stop_tokens: Collection[int]):
        self._grammar, self._least, self._stops = grammar, least, stop_tokens

    def fill_bitmask(self, tokens: Sequence[int], words: torch.Tensor) -> None:
        if self._grammar is not None:
            self._grammar.fill_bitmask(tokens, words)
        if len(tokens) < self._least:
            kept = words.tolist()
            for stop in self._stops:
                kept[stop // 32] &= ~(1 << stop % 32) if stop % 32 < 31 else 0x7FFFFFFF
            words.copy_(torch.tensor(kept, dtype=words.dtype))


class Constraints:
    """Compiles grammars for one tokenizer, and keeps the last ones. It can be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self._tokenizer, self._vocab = tokenizer, vocab
        self._lock, self._library_s = Lock(), None
        self._kept: OrderedDict[str, Constraint] = OrderedDict()

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
            raise ModuleNotFoundError(f"{what}: {kind} needs the package llguidance: "
                                      "pip install 'dflash-kernels[grammar]'") from None
        with self._lock:
            key = f"{kind}:{text}"
            if key not in self._kept:
                make = llguidance.LLMatcher.grammar_from_regex if kind == "regex" else \
                    llguidance.LLMatcher.grammar_from_json_schema
                matcher = llguidance.LLMatcher(self._library(llguidance), make(text), log_level=0)
                if matcher.is_error():
                    raise ValueError(f"{what}: {kind} must be one that llguidance {llguidance.__version__} can follow; "
                                     f"got {shown(text)}: {brief(matcher.get_error())}")
                self._kept[key] = Constraint(matcher)
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _library(self, llguidance: Any) -> Any:
        """The library's view of the tokenizer, which takes about a second to make."""
        if self._library_s is None:
            self._library_s = llguidance.LLTokenizer(self._tokenizer.backend.to_str(), n_vocab=self._vocab,
                                                     eos_token=list(self._tokenizer.stop_ids))
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
