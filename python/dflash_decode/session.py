"""A session: a loaded target with its tokenizer and drafter, shared by the command line and the benchmarks."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch

from dflash_kernels import StepGraph, build_info

from .arguments import choice, exists, of_type, path_text, read_device, read_dtype, stored_dtype, whole
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointNotFound,
    drafter_of,
    drafters,
    find_model,
    hub,
    load_checkpoint,
    no_drafter,
)
from .checkpoint.errors import brief, read_json, warn
from .checkpoint.tokenizer import Tokenizer, load_tokenizer
from .choices import AUTO, NONE, RANDOM, DraftersWeights, Rule, SampleFrom, Weights
from .extras import how_to_get
from .forecast import Forecast
from .inputs import shown
from .loop import Decoder
from .model import Target
from .model.calibration import read_calibration
from .model.config import is_drafter, names_drafter, with_block_size
from .model.dflash2 import read_selector
from .model.drafter import Drafter
from .model.families import FAMILIES, no_family
from .model.layouts import with_mask_token
from .model.multimodal import kind_of_text, text_part
from .model.native import NativeTarget
from .model.vocabulary import read_mask_embedding, read_vocabulary
from .prompts import read_prompt, read_prompts
from .requests import Request
from .sampling import GREEDY, SamplingParams, check_sampling

_KEPT = 4  # decoders, for runs with other numbers of requests and without the drafter
_CONTEXT_STEP = 256  # tokens to which a run's context is rounded up, so that a little longer prompt fits the next time


@dataclass
class Answer:
    """The answer to one prompt.

    tokens: the token ids.
    text: the tokens as text.
    steps: the tokens that each step committed, without the one of the prefill.
    widths: the tokens of each step's block that were verified, its anchor included.
    finish: "stop", "length" or "cancelled".
    seed: the seed of the output; None for greedy decoding.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    steps: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    finish: str = ""
    seed: int | None = None


@dataclass
class Run:
    """The answers to all prompts. seconds: from the first prompt's prefill to the last token, over all requests.
    forecast: what the loop expected of its steps, where it chooses widths by what steps cost."""

    answers: list[Answer]
    seconds: float
    forecast: Forecast | None = None

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
    def widths(self) -> list[int]:
        return [n for a in self.answers for n in a.widths]

    @property
    def verified_rows(self) -> float:
        """The mean number of tokens that a step verified for a request."""
        return sum(self.widths) / len(self.widths) if self.widths else 1.0

    @property
    def acceptance_length(self) -> float:
        """The mean number of tokens that a step committed."""
        return sum(self.steps) / len(self.steps) if self.steps else 1.0


@dataclass
class Session:
    model: str
    drafter_name: str
    target: Target
    tokenizer: Tokenizer
    drafter: Drafter | None
    block_size: int
    adapts: bool = False  # the tokens that a step verifies, up to block_size
    weights: str = "model"  # how the target's are kept: any of choices.Weights but "auto"
    # By what they were made for: the decoders of the last runs on a CPU, whose passes are recorded. A run takes its own
    # away, so runs in two threads do not meet in one.
    _decoders: dict[tuple, Decoder] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def load(cls, model: str | os.PathLike, drafter: str | os.PathLike | None = AUTO, *, block_size: int | None = None,
             dtype: str | torch.dtype = "bfloat16", device: str | torch.device = "cpu", weights: str = "auto",
             drafter_weights: str = "auto", tokenizer: str | os.PathLike | Tokenizer | None = None,
             native: bool = False, status: Callable[[str], AbstractContextManager] = lambda text: nullcontext(),
             ) -> "Session":
        """Loads a target, its tokenizer and a drafter.

        model: the target: a directory with config.json and safetensors, a .gguf file, a known name, or the id of a
            model in huggingface_hub's cache.
        drafter: a drafter's directory, .gguf file or id, the name of an installed drafter's target, "auto" (the
            installed drafter for the target, or none, with a warning), "random", or "none" or None.
        block_size: tokens per block, at most the drafter's block size, which is the default. Needed where the drafter's
            config has none.
        dtype: torch.bfloat16, float16 or float32, the name of one ("bf16", "half", "fp32"), or "auto" for that of
            config.json.
        device: "cpu" or a CUDA device.
        weights: "model" keeps the target's weights in its dtype. "int8" keeps them in 8 bits: a step reads half of the
            bytes, and the output can differ from the 16-bit target's. "file" keeps a GGUF file's weights in their
            blocks, and rounds what is multiplied with them to int8, as llama.cpp does. "exact" keeps the blocks too and
            gives the output of "model". "auto" is "file" for a GGUF file with such blocks on a CPU, else "model".
        drafter_weights: "int8", "model" for the target's dtype, or "auto" for 8 bits on a CPU with a 16-bit target,
            where they take half of the time to read. The output does not change.
        tokenizer: whose tokenizer the target uses, named as the model is, or a loaded one; by default the target's own.
        native: an error, instead of a warning, where our own layers lack what the config.json of a family of theirs
            asks for; and an error for other families. By default transformers' layers run those.
        status: status(text) is entered while the named part is loaded.

        Arguments are checked before anything is loaded. Raises TypeError and ValueError for wrong or inconsistent
        arguments, and CheckpointError for files that cannot be read.
        """
        what, named = "Session.load", NONE if drafter is None else drafter
        model, named = (path_text(what, name, value) for name, value in (("model", model), ("drafter", named)))
        asked, named = named, drafter_of(model, named)
        device, wanted = read_device(what, device), read_dtype(what, dtype)
        choice(what, "weights", weights, Weights)
        choice(what, "drafter_weights", drafter_weights, DraftersWeights)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            tokenizer = path_text(what, "tokenizer", tokenizer)
        of_type(what, "native", native, bool, "True or False")
        of_type(what, "status", status, Callable, "a function of a text that gives a context manager")
        block_size = None if block_size is None else whole(what, "block_size", block_size, 1)
        if named not in (RANDOM, NONE) and not exists(named) and hub.find_cached(named) is None:
            raise CheckpointNotFound(f"drafter must be {drafters()}, or {AUTO!r}, {RANDOM!r} or {NONE!r}; "
                                     f"got {shown(named)}, which does not exist{hub.hint(named)}")
        where = find_model(model)
        config = read_json(where / "config.json") if where.is_dir() else {}
        if names_drafter(config):
            raise CheckpointError(f"{where}: model must be a target model; got a drafter, which belongs in drafter")
        dtype = stored_dtype(where, config) if wanted is None else wanted
        weights = _weights(where, device, weights)
        with status(f"loading {model}"):
            if not isinstance(tokenizer, Tokenizer):
                tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
            target = _target(model, kind_of_text(config), dtype, device, weights, native)
        made: Drafter | None = None
        if named == RANDOM:
            with status("making a drafter of random weights"):
                made = Drafter.random(target, **({} if block_size is None else {"block_size": block_size}))
        elif named != NONE:
            with status(f"loading {named}"):
                made = drafter_for(target, load_checkpoint(named, dtype), drafter_weights, tokenizer.token_id,
                                   block_size)
        elif asked == AUTO:
            warn(f"decoding without speculation, which is slower: {no_drafter(model)}")
        width = 1 if made is None else made.block_size if block_size is None else block_size
        if made is not None and width > made.block_size:
            raise ValueError(f"block_size must be at most the drafter's {made.block_size}; got {width}")
        return cls(model, named, target, tokenizer, made, width, block_size is None, weights)

    def prompt_ids(self, prompt: object) -> list[int]:
        """The token ids of a prompt.

        A text becomes a user's message in the target's chat template; without a template it follows the target's BOS. A
        list of messages {"role": ..., "content": ...} goes through the template. Token ids are used as they are: a
        list, a tensor or array (n,) or (1, n), or the result of a transformers tokenizer.

        Raises TypeError for anything else, ValueError for an empty prompt and for ids outside the vocabulary, and
        CheckpointError where messages have no template or the template fails.
        """
        return read_prompt(self.tokenizer, self.target.vocab_size, prompt, "Session.prompt_ids: prompt")

    def run(self, prompts: object, *, max_tokens: int, concurrency: int = 1, speculative: bool = True,
            on_tokens: Callable[[int, list[int]], None] = lambda i, tokens: None,
            sampling: SamplingParams = GREEDY, sample_from: str = "greedy", rule: str = "token") -> Run:
        """Answers all prompts, with `concurrency` requests at a time.

        prompts: a list of prompts as prompt_ids takes them, or one such prompt.
        max_tokens: the maximum length of each answer, at least 1. The end of the context ends an answer earlier.
        speculative: False for baseline decoding.
        on_tokens: on_tokens(prompt's index, new tokens) is called as tokens arrive.
        sampling: of all prompts. Prompt i uses seed + i, or a fresh seed if there is none.
        sample_from, rule: as for Decoder.

        Raises TypeError and ValueError, before anything is decoded, for wrong arguments and for a prompt that does not
        fit the model's context. A grammar that fails while it is decoded ends the run with a ValueError.
        """
        what, room = "Session.run", self.target.max_context
        max_tokens = whole(what, "max_tokens", max_tokens, 1)
        concurrency = whole(what, "concurrency", concurrency, 1)
        of_type(what, "speculative", speculative, bool, "True or False")
        of_type(what, "on_tokens", on_tokens, Callable, "a function of a prompt's index and its new tokens")
        choice(what, "sample_from", sample_from, SampleFrom)
        choice(what, "rule", rule, Rule)
        sampling = check_sampling(sampling, what, self.target.vocab_size)
        prompts = read_prompts(self.tokenizer, self.target.vocab_size, prompts, what)
        for i, prompt in enumerate(prompts):
            if len(prompt) >= room:
                raise ValueError(f"{what}: prompt {i + 1} must be shorter than the model's context of {room} tokens; "
                                 f"got {len(prompt)}")
        longest = max(map(len, prompts), default=1)
        made_for, decoder = self._decoder(speculative, min(concurrency, max(len(prompts), 1)),
                                          min(room, longest + max_tokens), sample_from, rule)
        self._warm(decoder, prompts, sampling)
        before = decoder.forecast
        answers = [Answer() for _ in prompts]
        started = time.perf_counter()
        for event in decoder.stream(self._requests(prompts, max_tokens, sampling)):
            index = cast(int, event.id)
            if event.error is not None:
                why = event.error.removeprefix(f"request {event.id}: ")  # the caller knows prompts, not our requests
                raise ValueError(f"{what}: prompt {index + 1}: {why}")
            answer = answers[index]
            answer.tokens += event.tokens
            if event.finish is not None:
                answer.steps, answer.widths = event.acceptance_lengths, event.widths
                answer.finish, answer.seed = event.finish, event.seed
            on_tokens(index, event.tokens)
        seconds = time.perf_counter() - started
        for answer in answers:
            answer.text = self.tokenizer.decode(answer.tokens)
        after = decoder.forecast
        if self.target.device.type == "cpu":  # a GPU's memory may be wanted for another decoder's cache
            self._decoders[made_for] = decoder
            while len(self._decoders) > _KEPT:
                self._decoders.pop(next(iter(self._decoders)), None)
        return Run(answers, seconds, None if after is None else after - (before or Forecast()))

    def _decoder(self, speculative: bool, batch: int, context: int, sample_from: str,
                 rule: str) -> tuple[tuple, Decoder]:
        """A decoder, and what it is made for: that of an earlier run if there is one."""
        drafter = self.drafter if speculative else None
        block = self.block_size if drafter and not self.adapts else None
        made_for = (id(self.target), id(drafter), block, batch, sample_from, rule, build_info()["isa"],
                    torch.get_num_threads(), StepGraph.available("cpu"))
        decoder = self._decoders.pop(made_for, None)
        if decoder is None or decoder.max_context < context:
            room = min(self.target.max_context, -(-context // _CONTEXT_STEP) * _CONTEXT_STEP)
            decoder = Decoder(self.target, drafter, block_size=block, max_batch=batch, max_context=room,
                              sample_from=sample_from, rule=rule, reuse=False)
        return made_for, decoder

    def _requests(self, prompts, max_tokens, sampling) -> Iterator[Request]:
        for i, prompt in enumerate(prompts):
            seed = None if sampling.seed is None else (sampling.seed + i) % 2**63
            yield Request(i, list(prompt), max_tokens, self.tokenizer.stop_ids, replace(sampling, seed=seed))

    def _warm(self, decoder: Decoder, prompts, sampling) -> None:
        """Does before the clock runs what happens once: a GPU compiles and records, a CPU measures what steps cost."""
        if self.target.device.type == "cuda":
            decoder.warm_up(map(len, prompts), [sampling])
        else:
            decoder.ready()


def _weights(where: Path, device: torch.device, weights: str) -> str:
    """Of "auto", what it stands for. Raises CheckpointError for blocks that are not there or cannot be used."""
    from .checkpoint.gguf.file import has_blocks

    if weights not in (Weights.auto, Weights.file, Weights.exact):
        return weights
    fits = device.type == "cpu" and where.is_file()
    if weights == Weights.auto:
        return Weights.file.value if fits and has_blocks(where) else Weights.model.value
    if not fits:
        raise CheckpointError(f"{where}: weights {weights!r} must be those of a .gguf file on a CPU; got "
                              f"{'a directory' if where.is_dir() else f'device {device}'}")
    return weights


def _target(model: str, model_type: object, dtype: torch.dtype, device: torch.device, weights: str,
            native: bool = False) -> Target:
    """Loads our own layers where they support the model, and transformers' for all others. model_type: of its text, in
    config.json; None where that has none, and for a GGUF file."""
    where = find_model(model)
    if model_type not in (None, *FAMILIES):
        return _hf_target(where, None, _not_ours(where, model_type, weights, native), dtype, device)
    found = text_part(load_checkpoint(model, dtype, blocks=weights in (Weights.file, Weights.exact)))
    if names_drafter(found.config):
        raise CheckpointError(f"{found.source}: model must be a target model; got a drafter, which belongs in drafter")
    if where.is_file() and (kind := found.config["model_type"]) not in FAMILIES:
        return _hf_target(where, found, _not_ours(where, kind, weights, native), dtype, device)
    try:
        return NativeTarget(found.config, found.tensors, dtype=dtype, device=device, int8=weights == Weights.int8,
                            exact=weights == Weights.exact)
    except NotImplementedError as error:
        if native or where.is_file() or weights == Weights.int8 or model_type is None:
            raise CheckpointError(f"{found.source}: {error}") from error
        try:
            target = _hf_target(where, None, "", dtype, device)
        except CheckpointError as theirs:
            raise CheckpointError(f"{found.source}: {error}; {str(theirs).removeprefix(f'{where}: ')}") from theirs
        warn(f"{where}: transformers' own layers run this model, which is slower, and in 16 bits output with a drafter "
             f"can differ from output without one at a near tie: {error}")
        return target
    except ValueError as error:
        raise CheckpointError(f"{found.source}: {error}") from error


def _not_ours(where: Path, model_type: object, weights: str, native: bool) -> str:
    """What needs transformers' layers. Raises CheckpointError if they must not run the model."""
    if native:
        raise CheckpointError(f"{where}: native layers need a model_type of {no_family(model_type)}")
    if weights != Weights.model:
        what = "weights in 8 bits" if weights == Weights.int8 else f"weights {weights!r}"
        raise CheckpointError(f"{where}: {what} need a model_type of {no_family(model_type)}")
    return f"model_type {shown(model_type)} "


def _hf_target(where: Path, found: Checkpoint | None, why: str, dtype: torch.dtype, device: torch.device) -> Target:
    """transformers' layers, with the tensors of `found`, or of the directory. why: said where transformers is missing.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise CheckpointError(f"{where}: {why}needs transformers: {how_to_get('hf')}") from None
    from .model.hf_loading import load_hf, load_hf_tensors

    try:
        return load_hf(where, dtype, device) if found is None else load_hf_tensors(found, dtype, device)
    except Exception as error:  # a config out of range gives whatever the model's own code meets first
        raise CheckpointError(f"{where}: {brief(error)}") from error


def _int8(drafter_weights: str, target: Target) -> bool:
    if drafter_weights != DraftersWeights.auto:
        return drafter_weights == DraftersWeights.int8
    return target.device.type == "cpu" and target.dtype.itemsize == 2


def drafter_for(target: Target, found: Checkpoint, drafter_weights: str,
                token_id: Callable[[str], int | None], block_size: int | None = None) -> Drafter:
    """The drafter of a checkpoint. drafter_weights: as for Session.load. token_id: of a token's text in the target's
    tokenizer. block_size: of a config that has none. Raises CheckpointError."""
    if "open_spec_config_version" in found.config:
        raise CheckpointError(f"{found.source}: drafter must be in z-lab's format or in the speculators format with "
                              "transformer_layer_config; got one with open_spec_config_version")
    if not is_drafter(found.config):
        raise CheckpointError(f"{found.source}: drafter must be a DFlash drafter, whose config.json has dflash_config "
                              f"or block_size; got a model with model_type {shown(found.config.get('model_type'))}")
    try:
        vocabulary = read_vocabulary(found.source)
        selector, fields = read_selector(found.source, vocabulary, target.vocab_size)
        tensors = {**cast(Mapping[str, torch.Tensor], found.tensors), **read_mask_embedding(found.source), **selector}
        config = {**with_mask_token(with_block_size(found.config, block_size), token_id), **fields}
        drafter = Drafter(config, tensors, target, vocabulary, int8=_int8(drafter_weights, target))
        drafter.calibration = read_calibration(found.source, drafter.block_size - 1)
        return drafter
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{found.source}: {error}") from error
