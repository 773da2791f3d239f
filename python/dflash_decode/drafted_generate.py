"""A drafter for transformers' own `model.generate`, by its argument `custom_generate`."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch

from .arguments import choice, path_text, whole
from .choices import DraftersWeights
from .inputs import shown, within
from .llm.grammars import MinTokens
from .loop import Decoder
from .model import Target
from .model.drafter import Drafter
from .requests import Request
from .sampling import SamplingParams

_WHAT = "DraftedGenerate"
# What generate itself hands over, and what follows from the tokens.
_TAKEN = {"attention_mask", "cache_position", "logits_to_keep", "position_ids", "return_dict", "use_cache"}
_NOT_MADE = ("output_attentions", "output_hidden_states", "output_logits", "output_scores",
             "assistant_early_exit", "dola_layers", "penalty_alpha", "prompt_lookup_num_tokens", "speculation_type")


# Of the processors that change a distribution, as verify_sample applies them too.
_ORDER = ("RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
          "MinPLogitsWarper")


class DraftedGenerate:
    """Makes `model.generate` of a transformers model speculative.

    The prompts, lengths, stop tokens and settings are those of the call, and so is the result. In float32 the text of
    greedy decoding is that of `generate` without it. In 16 bits it can differ at a near tie, as transformers' matrix
    products depend on the number of rows. A sampled answer is another draw from the same distribution, and follows
    torch.manual_seed.

    Parameters
    ----------
    drafter : str or path
        A DFlash drafter for the model: a directory, a .gguf file, or the id of one on the Hugging Face Hub that is in
        the local cache.
    block_size : int, optional
        The tokens of every block; by default as many as pay. Needed where the drafter's config has none.
    drafter_weights : str
        As for Session.load.
    max_batch : int
        Prompts that are decoded at the same time.
    tokenizer : transformers tokenizer, optional
        For a drafter that has its mask token as text.

    Raises
    ------
    TypeError, ValueError
        For wrong arguments. When called, also for settings that it cannot follow, before anything is decoded: beams,
        an assistant_model and other ways to draft, use_cache=False, scores, a streamer for several prompts, logits
        processors and model inputs that it does not know, processors in an order that generate's own have not, min_p
        with top_p, and lengths beyond the model's context.
    CheckpointError
        When it is first called, for a drafter that cannot be read.
    NotImplementedError
        When it is first called, for a model that cannot be a target (docs/decoding.md).

    Notes
    -----
    It keeps the last model and the drafter for it. During a call the model's attention is ours; afterwards it is as
    before. A streamer gets each token of one prompt's answer as it is committed. transformers hands no tokenizer to a
    `custom_generate`, so it has no stop strings: `LLM.stream` has them.

    Source: tests/decode/test_drafted_generate.py compares it with `generate`.

    Examples
    --------
    >>> from dflash_decode import DraftedGenerate
    >>> drafted = DraftedGenerate("z-lab/Qwen3-8B-DFlash-b16")
    >>> # model.generate(**inputs, max_new_tokens=256, custom_generate=drafted)
    """

    def __init__(self, drafter: str | os.PathLike, *, block_size: int | None = None, drafter_weights: str = "auto",
                 max_batch: int = 8, tokenizer: Any = None):
        self.drafter = path_text(_WHAT, "drafter", drafter)
        self.block_size = None if block_size is None else whole(_WHAT, "block_size", block_size, 1)
        self.drafter_weights = choice(_WHAT, "drafter_weights", drafter_weights, DraftersWeights)
        self.max_batch = whole(_WHAT, "max_batch", max_batch, 1)
        self.tokenizer = tokenizer
        self._known: tuple[Any, tuple, Target, Drafter] | None = None

    def __call__(self, model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any,
                 generation_config: Any, **model_kwargs: Any) -> Any:
        """Called by `generate`."""
        streamer, assistant = _not_handed_over(sys._getframe(1))
        _refuse(generation_config, model_kwargs, assistant)
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"{_WHAT}: streamer must be given with one prompt; got {len(prompts)}")
        lengths, ends, others = _criteria(stopping_criteria)
        room = max(1, min(lengths, default=generation_config.max_length) - input_ids.shape[1])
        with _as_it_was(model), torch.inference_mode():
            target, drafter = self._models(model)
            if (needed := max(map(len, prompts)) + room) > target.max_context:
                raise ValueError(f"{_WHAT}: prompts and max_new_tokens must fit into the model's context of "
                                 f"{target.max_context} tokens; got {needed}")
            stops = frozenset(within(ends, target.vocab_size))
            settings = _settings(logits_processor, bool(generation_config.do_sample), target.vocab_size,
                                 input_ids.shape[1], [input_ids.shape[1] - len(prompt) for prompt in prompts])
            decoder = Decoder(target, drafter, block_size=self.block_size, max_batch=min(len(prompts), self.max_batch),
                              max_context=needed)
            wanted = [Request(i, prompt, room, stops, SamplingParams(**settings, seed=seed))
                      for i, (prompt, seed) in enumerate(zip(prompts, _seeds(len(prompts)), strict=True))]
            found: list[list[int]] = [[] for _ in prompts]
            done = [False] * len(prompts)
            for event in decoder.stream(wanted):
                at = cast(int, event.id)
                if event.error is not None:
                    raise ValueError(f"{_WHAT}: prompt {at + 1}: {event.error}")
                for token in () if done[at] else event.tokens:
                    found[at].append(token)
                    if streamer is not None:
                        streamer.put(input_ids.new_tensor([token]).cpu())
                    if others and self._ends(others, input_ids[at], found[at]):
                        done[at] = True
                        decoder.cancel(at)
                        break
            if streamer is not None:
                streamer.end()
            answers = [torch.tensor(one, dtype=input_ids.dtype, device=input_ids.device) for one in found]
        return _result(input_ids, answers, _padding(generation_config, ends),
                       generation_config.return_dict_in_generate)

    def _models(self, model: Any) -> tuple[Target, Drafter]:
        """The target and the drafter; those of the last call, unless the model or its weights are others."""
        from .checkpoint import CheckpointNotFound, load_checkpoint
        from .model.hf import IMPLEMENTATION, HFTarget
        from .session import drafter_for

        shared = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        now = tuple((one.data_ptr(), one._version, one.dtype, one.device, _some_sum(one)) for one in shared)
        if self._known is not None and self._known[0] is model and self._known[1] == now:
            model.set_attn_implementation(IMPLEMENTATION)
            model.eval()
            return self._known[2:]
        self._known = None
        target = HFTarget(model)
        try:
            found = load_checkpoint(self.drafter, target.dtype)
        except CheckpointNotFound as error:
            raise CheckpointNotFound(f"{_WHAT}: drafter: {error}") from None
        drafter = drafter_for(target, found, self.drafter_weights,
                              lambda text: _token_id(self.tokenizer, text), self.block_size)
        self._known = model, now, target, drafter
        return target, drafter

    @staticmethod
    def _ends(criteria: Sequence[Any], prompt: torch.Tensor, answer: Sequence[int]) -> bool:
        ids = torch.cat([prompt, prompt.new_tensor(answer)])[None]
        return any(bool(torch.as_tensor(one(ids, None)).any()) for one in criteria)


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    attention, training = model.config._attn_implementation, model.training
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


def _not_handed_over(caller: FrameType) -> tuple[Any, Any]:
    """The streamer and the assistant_model of the call. `generate` keeps both from a function, and says nothing."""
    named = caller.f_locals if caller.f_code.co_name == "generate" else {}
    return named.get("streamer"), named.get("assistant_model")


def _refuse(config: Any, model_kwargs: dict[str, Any], assistant: Any) -> None:
    if (config.num_beams or 1) != 1:
        raise ValueError(f"{_WHAT}: num_beams must be 1; got {config.num_beams}")
    if assistant is not None:
        raise ValueError(f"{_WHAT}: assistant_model must be None, as this object drafts; got a "
                         f"{type(assistant).__name__}")
    if model_kwargs.get("use_cache") is False:
        raise ValueError(f"{_WHAT}: use_cache must be True; got False")
    for name in _NOT_MADE:
        if getattr(config, name, None):
            raise ValueError(f"{_WHAT}: {name} must be off; got {shown(getattr(config, name))}")
    cache = model_kwargs.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"{_WHAT}: past_key_values must be empty; got {cache.get_seq_length()} tokens")
    for name, value in model_kwargs.items():
        if name not in _TAKEN and value is not None:
            raise ValueError(f"{_WHAT}: the model's inputs must be input_ids and attention_mask; got {name}")


def _prompts(ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts without the padding on their left."""
    prompts = []
    for i, row in enumerate(ids):
        kept = torch.ones_like(row) if mask is None else mask[i]
        at = int(kept.bool().int().argmax())
        if not bool(kept[at:].all()):
            raise ValueError(f"{_WHAT}: attention_mask must have its zeros on the left; got {kept.tolist()}")
        prompts.append(row[at:].tolist())
    return prompts


def _criteria(criteria: Any) -> tuple[list[int], list[int], list[Any]]:
    """The lengths and the tokens that end an answer, and what else does."""
    lengths: list[int] = []
    tokens: list[int] = []
    others = []
    for one in criteria:
        match type(one).__name__:
            case "MaxLengthCriteria":
                lengths.append(int(one.max_length))
            case "EosTokenCriteria":
                tokens += torch.as_tensor(one.eos_token_id).flatten().tolist()
            case _:
                others.append(one)
    return lengths, tokens, others


def _padding(config: Any, ends: Sequence[int]) -> int:
    """As generate takes it: a first stop token where there is none of its own."""
    own = config.eos_token_id
    first = own if isinstance(own, int) else next(iter(own or ends), 0)
    return first if config.pad_token_id is None else config.pad_token_id


def _settings(processors: Any, sampled: bool, vocab: int, length: int,
              padding: list[int]) -> dict[str, Any]:
    """SamplingParams' fields for transformers' logits processors. length: of the prompts with their padding."""
    found: dict[str, Any] = {"temperature": 1.0 if sampled else 0.0}
    grammar: MinTokens | None = None
    names = [type(one).__name__ for one in processors]
    order = [_ORDER.index(name) for name in names if name in _ORDER]
    if order != sorted(order):
        raise ValueError(f"{_WHAT}: logits processors must be in the order {', '.join(_ORDER)}; got {', '.join(names)}")
    for one in processors:
        match type(one).__name__:
            case "TemperatureLogitsWarper":
                found["temperature"] = float(one.temperature) if sampled else 0.0
            case "TopKLogitsWarper":
                found["top_k"] = int(one.top_k)
            case "TopPLogitsWarper" if one.min_tokens_to_keep == 1:
                found["top_p"] = float(one.top_p)
            case "MinPLogitsWarper" if one.min_tokens_to_keep == 1:
                found["min_p"] = float(one.min_p)
            case "RepetitionPenaltyLogitsProcessor" if _ignores(one, padding):
                found["repetition_penalty"] = float(one.penalty)
            case "MinNewTokensLengthLogitsProcessor" | "MinLengthLogitsProcessor" as name:
                needed = one.min_length - length if name == "MinLengthLogitsProcessor" else one.min_new_tokens
                banned = within(torch.as_tensor(one.eos_token_id).flatten().tolist(), vocab)
                if needed > 0 and banned:
                    grammar = MinTokens(grammar, needed, banned)
            case "LogitNormalization":
                pass
            case name:
                raise ValueError(f"{_WHAT}: logits processors must be temperature, top_k, top_p, min_p, "
                                 f"repetition_penalty or min_new_tokens; got {name}")
    if sampled and found.get("min_p", 0.0) > 0 and found.get("top_p", 1.0) < 1:
        raise ValueError(f"{_WHAT}: min_p must be 0 with top_p, of what transformers' top_p leaves; got "
                         f"{found['min_p']} and {found['top_p']}")
    return found | {"grammar": grammar}


def _ignores(penalty: Any, padding: list[int]) -> bool:
    """Whether a repetition penalty is for all of the prompts but their padding."""
    ignored = penalty.prompt_ignore_length
    if isinstance(ignored, torch.Tensor):
        return ignored.tolist() == padding
    return not ignored and not any(padding)


def _seeds(count: int) -> list[int]:
    return torch.randint(2**63 - 1, (count,)).tolist()


def _token_id(tokenizer: Any, text: str) -> int | None:
    if tokenizer is None:
        raise ValueError(f"{_WHAT}: tokenizer must be given, as the drafter has its mask token as text, {shown(text)}; "
                         "got None")
    return tokenizer.get_vocab().get(text)


def _some_sum(weight: torch.Tensor) -> str:
    """Of a few rows: what is written through `.data` changes neither the weight's place nor its version."""
    return str(float(weight.detach()[::max(len(weight) // 64, 1)].float().sum()))


def _result(input_ids: torch.Tensor, answers: Sequence[torch.Tensor], pad: int, as_dict: bool) -> Any:
    """The prompts and their answers, padded on the right."""
    padded = input_ids.new_full((len(answers), max(map(len, answers))), pad)
    for row, answer in zip(padded, answers, strict=True):
        row[:len(answer)] = answer
    sequences = torch.cat([input_ids, padded], 1)
    if not as_dict:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences))
