"""Results: an answer as a whole, and the pieces of it that arrive before."""

from dataclasses import dataclass, field

from ..logprobs import TokenLogprobs


class GenerationError(RuntimeError):
    """An answer could not be finished: its grammar failed, or the decoder did."""


@dataclass
class Completion:
    """An answer.

    Attributes
    ----------
    text : str
        The answer without special tokens, and without what ended it.
    token_ids : list of int
        Its tokens, up to the stop token or the token that completed a stop string.
    finish_reason : str
        "stop" for a stop token or string, "length" for max_tokens or the end of the context, or "cancelled".
    stop_reason : str or int, optional
        The stop string, or the token of stop_token_ids, that ended the answer; None for the model's own stop tokens.
    logprobs : list of TokenLogprobs, optional
        One for each token, with the texts of the tokens, if they were asked for.
    seed : int, optional
        Gives this answer again; None where it was greedy.
    prompt_token_ids : list of int
        The prompt.
    steps, widths : tuple of int
        The tokens that each step of the loop committed, without the first one, and the tokens that it verified.
    time_to_first_token, seconds : float
        Seconds from the call to the first token and to the end, time in the queue included.
    cached_tokens : int
        Tokens of the prompt whose K/V were there, of an earlier prompt and answer that began with them.
    others : list of Completion
        The further answers to this prompt, of n > 1.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    seed: int | None = None
    prompt_token_ids: list[int] = field(default_factory=list, repr=False)
    steps: tuple[int, ...] = field(default=(), repr=False)
    widths: tuple[int, ...] = field(default=(), repr=False)
    time_to_first_token: float = 0.0
    seconds: float = 0.0
    cached_tokens: int = 0
    others: list["Completion"] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def choices(self) -> list["Completion"]:
        """All n answers, this one first."""
        return [self, *self.others]

    @property
    def acceptance_length(self) -> float:
        """The mean number of tokens that a step committed."""
        return sum(self.steps) / len(self.steps) if self.steps else 1.0

    @property
    def verified_rows(self) -> float:
        """The mean number of tokens that a step verified."""
        return sum(self.widths) / len(self.widths) if self.widths else 1.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, over all of `seconds`."""
        return len(self.token_ids) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer.

    choice: the answer's number, from 0 to n - 1.
    text: the new text; it can be empty.
    token_ids, logprobs: the new tokens.
    completion: the whole answer, in its last chunk.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    completion: Completion | None = None
