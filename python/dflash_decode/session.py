"""A model, its tokenizer and a drafter, loaded and ready: what the command line and the benchmark share."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .draft import Drafter, read_vocabulary, refuse_side_files
from .loop import Decoder
from .requests import Request
from .sampling import GREEDY, Sampling, check_sampling
from .targets import Target
from .targets.native import FAMILIES, NativeTarget
from .tokenizer import Tokenizer, load_tokenizer
from .weights import (
    AUTO,
    Checkpoint,
    CheckpointError,
    CheckpointNotFound,
    brief,
    drafter_of,
    find_model,
    load_checkpoint,
    read_json,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
RANDOM, NONE = "random", "none"
WEIGHTS, DRAFT_WEIGHTS = ("model", "int8"), ("auto", "int8", "model")


@dataclass
class Answer:
    """steps: how many tokens each step committed, the prompt's pass apart. seed: None where nothing was drawn."""

    tokens: list[int] = field(default_factory=list)
    steps: tuple[int, ...] = ()
    finish: str = ""
    seed: int | None = None


@dataclass
class Run:
    """seconds: from the first prompt's first pass to the last token, all requests together."""

    answers: list[Answer]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(a.tokens) for a in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def steps(self) -> list[int]:
        return [n for a in self.answers for n in a.steps]

    @property
    def acceptance_length(self) -> float:
        """Mean number of tokens that a step committed."""
        return sum(self.steps) / len(self.steps) if self.steps else 1.0

    def histogram(self, width: int) -> list[int]:
        """How many steps committed 1, 2, ... `width` tokens."""
        return [self.steps.count(n) for n in range(1, width + 1)]


@dataclass
class Session:
    model: str
    draft: str
    target: Target
    tokenizer: Tokenizer
    drafter: Drafter | None
    block_size: int
    adapts: bool = False  # to how many requests run at once, up to block_size
    weights: str = "model"  # what the model's are kept in

    @classmethod
    def load(cls, model: str, draft: str = AUTO, *, block_size: int | None = None, dtype: str = "bfloat16",
             device: str = "cpu", weights: str = "model", draft_weights: str = "auto",
             status: Callable[[str], AbstractContextManager] = lambda text: nullcontext(),
             ) -> "Session":
        """draft: a drafter's directory, "auto" (the one that comes with this package for the model, or none), "random"
        or "none". device: "cpu" or a CUDA device. weights: "model" keeps the model's as they are, "int8" in 8 bits:
        half of the bytes a step, and another model, whose text differs here and there. draft_weights: the drafter's, in
        "int8", as the "model"'s, or "auto": in 8 bits on a CPU beside a model in 16, where reading them takes half of
        the time; the text is the same. status(text) is entered while the part that
        it names is loaded. Raises CheckpointError for what cannot be read, ValueError for what does not fit together.
        """
        draft = drafter_of(model, draft)
        if draft not in (RANDOM, NONE) and not Path(draft).expanduser().exists():
            raise CheckpointNotFound(f"draft must be a drafter's directory, {AUTO!r}, {RANDOM!r} or {NONE!r}; "
                                     f"got {draft!r}, which does not exist")
        with status(f"loading {model}"):
            target = _target(model, DTYPES[dtype], torch.device(device), weights)
            tokenizer = load_tokenizer(model)
        drafter = None
        if draft == RANDOM:
            with status("making a drafter of random weights"):
                drafter = Drafter.random(target, **({} if block_size is None else {"block_size": block_size}))
        elif draft != NONE:
            with status(f"loading {draft}"):
                drafter = _drafter(load_checkpoint(draft, DTYPES[dtype]), target, _int8(draft_weights, target))
        width = 1 if drafter is None else drafter.block_size if block_size is None else block_size
        if drafter is not None and width > drafter.block_size:
            raise ValueError(f"--block-size must be at most the drafter's {drafter.block_size}; got {width}")
        return cls(model, draft, target, tokenizer, drafter, width, block_size is None, weights)

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a user's message, in the model's chat template where it has one."""
        if self.tokenizer.chat_template:
            return self.tokenizer.encode(self.tokenizer.apply_chat_template([{"role": "user", "content": text}]))
        return self.tokenizer.encode(text, add_special_tokens=True)

    def run(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, concurrency: int = 1,
            speculative: bool = True, on_tokens: Callable[[int, list[int]], None] = lambda i, tokens: None,
            sampling: Sampling = GREEDY, sample_from: str = "greedy", rule: str = "token") -> Run:
        """Answers all prompts, `concurrency` at a time. on_tokens(prompt's index, new tokens) is called as they come.
        sampling: of all prompts; prompt i draws with seed + i, or with a fresh seed if there is none.
        sample_from, rule: as for Decoder.
        Raises ValueError for a prompt that does not fit the model's context; nothing is answered then."""
        check_sampling(sampling, "sampling", self.target.vocab_size)
        room = self.target.max_context
        for i, prompt in enumerate(prompts):
            if len(prompt) >= room:
                raise ValueError(f"prompt {i + 1} must be shorter than the model's context of {room} tokens; "
                                 f"got {len(prompt)}")
        longest = max(map(len, prompts), default=1)
        decoder = Decoder(self.target, self.drafter if speculative else None,
                          block_size=self.block_size if speculative and self.drafter and not self.adapts else None,
                          max_batch=min(concurrency, max(len(prompts), 1)),
                          max_context=min(room, longest + max_new_tokens), sample_from=sample_from, rule=rule)
        self._warm(decoder, prompts, sampling)
        answers = [Answer() for _ in prompts]
        started = time.perf_counter()
        for event in decoder.stream(self._requests(prompts, max_new_tokens, sampling)):
            if event.error is not None:
                raise ValueError(f"prompt {event.id + 1}: {event.error}")
            answer = answers[event.id]
            answer.tokens += event.tokens
            if event.finish is not None:
                answer.steps, answer.finish, answer.seed = event.acceptance_lengths, event.finish, event.seed
            on_tokens(event.id, event.tokens)
        return Run(answers, time.perf_counter() - started)

    def _requests(self, prompts, max_new_tokens, sampling) -> Iterator[Request]:
        for i, prompt in enumerate(prompts):
            seed = None if sampling.seed is None else (sampling.seed + i) % 2**63
            yield Request(i, list(prompt), max_new_tokens, self.tokenizer.stop_ids, replace(sampling, seed=seed))

    def _warm(self, decoder: Decoder, prompts, sampling) -> None:
        """Memory, recorded steps and threads are made before the clock runs, the same for both ways of decoding."""
        decoder.warm_up(map(len, prompts), [sampling])


def _target(model: str, dtype: torch.dtype, device: torch.device, weights: str) -> Target:
    """Our own layers where the model is of a family that they serve, transformers' where they do not."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}; got {weights!r}")
    where = find_model(model)
    if where.is_dir() and (kind := read_json(where / "config.json").get("model_type")) not in (None, *FAMILIES):
        if weights == "int8":
            raise CheckpointError(f"{where}: weights in 8 bits need a model_type of {', '.join(FAMILIES)}; "
                                  f"got {kind!r}")
        return _hf_target(where, dtype, device)
    found = load_checkpoint(model, dtype)
    try:
        return NativeTarget(found.config, found.tensors, dtype=dtype, device=device, int8=weights == "int8")
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{found.source}: {error}") from error


def _hf_target(folder: Path, dtype: torch.dtype, device: torch.device) -> Target:
    try:
        import transformers
    except ImportError:
        kind = read_json(folder / "config.json")["model_type"]
        raise CheckpointError(f"{folder}: model_type {kind!r} needs transformers: "
                              "pip install 'dflash-kernels[hf]'") from None
    from .targets.hf import HFTarget

    transformers.utils.logging.disable_progress_bar()
    try:
        return HFTarget(transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True).to(device))
    except (ValueError, NotImplementedError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}: {brief(error)}") from error


def _int8(draft_weights: str, target: Target) -> bool:
    if draft_weights not in DRAFT_WEIGHTS:
        raise ValueError(f"draft_weights must be one of {', '.join(DRAFT_WEIGHTS)}; got {draft_weights!r}")
    if draft_weights != "auto":
        return draft_weights == "int8"
    return target.device.type == "cpu" and target.dtype.itemsize == 2


def _drafter(found: Checkpoint, target: Target, int8: bool) -> Drafter:
    try:
        refuse_side_files(found.source)
        return Drafter(found.config, found.tensors, target, read_vocabulary(found.source), int8=int8)
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{found.source}: {error}") from error
