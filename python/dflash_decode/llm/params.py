"""How an answer is made: `GenerationParams`, and what it comes to for one model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from ..arguments import of_type, whole
from ..inputs import integer, is_token_list, items, shown, within
from ..sampling import Grammar, SamplingParams, check_sampling
from .defaults import Defaults
from .grammars import Constraints, MinTokens

MOST_CHOICES = 1024


@dataclass(frozen=True)
class GenerationParams:
    """How one prompt is answered.

    What is None is as the model's generation_config.json says, or off: greedy decoding.

    Parameters
    ----------
    max_tokens : int, optional
        The most tokens of the answer; by default 256, unless the model's file has max_new_tokens. Where the context
        has room for fewer, the answer ends there, and a warning says so if this was named.
    temperature : float, optional
        0 is greedy: always the most likely token.
    top_k : int, optional
        Samples from the K most likely tokens; 0 or -1 from all.
    top_p : float, optional
        Samples from the most likely tokens that have this probability together; 1 from all.
    min_p : float, optional
        Samples from tokens with at least this share of the highest probability; 0 from all.
    seed : int, optional
        The same seed gives the same answer, whatever else is decoded beside it. None: a fresh one, which the result
        names.
    stop : str or sequence of str
        The answer ends before the first of these texts.
    stop_token_ids : collection of int
        Tokens that end the answer, beside the model's own. Their text is not part of the answer's.
    ignore_eos : bool
        The model's own stop tokens do not end the answer.
    min_tokens : int
        Before so many tokens, nothing but max_tokens ends the answer. A stop string counts if it ends behind them.
    n : int
        The number of answers. Answer i uses seed + i.
    logprobs : int, optional
        With each token come its log probability and those of so many most likely tokens, of the target's distribution
        at temperature 1. None: none are computed.
    repetition_penalty : float, optional
        Divides positive logits of tokens in prompt or answer, and multiplies negative ones; 1 is off.
    presence_penalty, frequency_penalty : float
        Subtracted from the logits of tokens in the answer, once or for each occurrence; 0 is off.
    logit_bias : mapping of int to float
        Added to the logits of these tokens; -inf bans one.
    json_schema : dict, str or class, optional
        The answer is JSON of this schema, given as a dict, as text, or as a pydantic model. Needs the extra `grammar`.
    regex : str, optional
        The answer as a whole matches this regular expression. Needs the extra `grammar`.
    grammar : Grammar, optional
        An object of your own that says what may come next.
    cache_salt : str
        A prompt starts from the K/V of earlier ones of the same salt alone. Where several users share a model, a salt
        for each keeps them from telling by the time of an answer what others have asked. The answer does not change.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    json_schema: Mapping[str, Any] | str | type | None = None
    regex: str | None = None
    grammar: Grammar | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if integer(self.top_k) == -1:
            object.__setattr__(self, "top_k", 0)


NAMES = tuple(each.name for each in fields(GenerationParams))
_SAMPLING = tuple(each.name for each in fields(SamplingParams))


class Plan(NamedTuple):
    """What the parameters of one prompt come to: those of its requests, and the text's."""

    samplings: tuple[SamplingParams, ...]  # of each of the n answers
    max_tokens: int
    stop_tokens: frozenset[int]
    own_stops: frozenset[int]  # those of them that are the model's
    logprobs: int | None
    stops: tuple[str, ...]
    min_tokens: int
    cache_salt: str


def read_params(what: str, params: object, given: Mapping[str, Any], count: int) -> list[GenerationParams]:
    """The parameters of `count` prompts: one for all or one for each, and `given`, by name, over them. Raises TypeError
    and ValueError, with messages that begin with `what`."""
    if unknown := sorted(set(given) - set(NAMES)):
        raise TypeError(f"{what}: parameters must be among {', '.join(NAMES)}; got {unknown[0]}")
    many = isinstance(params, Sequence) and not isinstance(params, str)
    each = list(params) if many else [params] * count  # type: ignore[call-overload]
    if len(each) != count:
        raise ValueError(f"{what}: params must be one for all prompts or a list of {count}, one for each; got "
                         f"{len(each)}")
    return [replace(_one(what, one), **given) for one in each]


def _one(what: str, params: object) -> GenerationParams:
    if params is None:
        return GenerationParams()
    if isinstance(params, SamplingParams):
        return GenerationParams(**{name: getattr(params, name) for name in _SAMPLING})
    of_type(what, "params", params, GenerationParams, "GenerationParams, SamplingParams, or a list of them")
    return params  # type: ignore[return-value]  # of_type has seen it


def plan(what: str, params: GenerationParams, defaults: Defaults, constraints: Constraints,
         own_stops: Collection[int], vocab: int) -> Plan:
    """Checks the parameters and fills in the model's. own_stops: the model's stop tokens."""
    merged = {name: default if (value := getattr(params, name)) is None else value
              for name, default in vars(defaults).items()}
    max_tokens, n = whole(what, "max_tokens", merged.pop("max_tokens"), 1), whole(what, "n", params.n, 1, MOST_CHOICES)
    min_tokens = whole(what, "min_tokens", params.min_tokens, 0)
    if min_tokens > max_tokens:
        raise ValueError(f"{what}: min_tokens must be at most max_tokens, {max_tokens}; got {min_tokens}")
    logprobs = None if params.logprobs is None else whole(what, "logprobs", params.logprobs, 0, vocab)
    of_type(what, "cache_salt", params.cache_salt, str, "a text")
    of_type(what, "ignore_eos", params.ignore_eos, bool, "True or False")
    own = frozenset(() if params.ignore_eos else within(own_stops, vocab))
    stop_tokens = own.union(_stop_tokens(what, params.stop_token_ids, vocab))
    grammar = constraints.grammar(what, params.json_schema, params.regex, params.grammar)
    for name in _SAMPLING:
        merged.setdefault(name, getattr(params, name))
    sampling = check_sampling(SamplingParams(**merged | {"grammar": grammar}), what, vocab)
    seeds = [None if sampling.seed is None else (sampling.seed + i) % 2**63 for i in range(n)]
    ours = grammar is not params.grammar  # made for these answers: the first can have it
    samplings = tuple(replace(sampling, seed=seed, grammar=_of_one_answer(
        grammar if ours and i == 0 else _fresh(grammar), min_tokens, stop_tokens)) for i, seed in enumerate(seeds))
    return Plan(samplings, max_tokens, stop_tokens, own, logprobs, _stops(what, params.stop), min_tokens,
                params.cache_salt)


def _fresh(grammar: Grammar | None) -> Grammar | None:
    fresh = getattr(grammar, "fresh", None)
    return fresh() if callable(fresh) else grammar


def _of_one_answer(grammar: Grammar | None, min_tokens: int, stop_tokens: Collection[int]) -> Grammar | None:
    return MinTokens(grammar, min_tokens, stop_tokens) if min_tokens and stop_tokens else grammar


def _stops(what: str, given: object) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else () if given is None else given
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise TypeError(f"{what}: stop must be a text or a list of texts; got {shown(given)}")
    if not all(stops):
        raise ValueError(f"{what}: stop must be texts of at least 1 character; got {shown(given)}")
    return tuple(dict.fromkeys(stops))


def _stop_tokens(what: str, given: Any, vocab: int) -> set[int]:
    if given is not None and not is_token_list(given, ordered=False):
        raise TypeError(f"{what}: stop_token_ids must be a collection of token ids; got {shown(given)}")
    found = set()
    for one in [] if given is None else items(given):
        if (token := integer(one)) is None or not 0 <= token < vocab:
            raise (TypeError if token is None else ValueError)(
                f"{what}: stop_token_ids must be token ids in [0, {vocab}); got {shown(one)}")
        found.add(token)
    return found
