"""`LLM`: a model, its drafter and its tokenizer, for text in and text out."""

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..arguments import choice, of_type, whole
from ..checkpoint import find_model
from ..checkpoint.errors import warn
from ..checkpoint.tokenizer import Tokenizer
from ..choices import AUTO, Rule, SampleFrom
from ..inputs import shown
from ..loop import Decoder
from ..prompts import Reading, is_single, read_prompts
from ..sampling import SamplingParams
from ..session import Session
from .defaults import read_defaults
from .engine import Engine, Workload
from .grammars import COMPILED, Constraints
from .params import GenerationParams, Plan, plan, read_params
from .streams import AsyncStream, Stream, Texts

Params = GenerationParams | SamplingParams | Sequence[GenerationParams | SamplingParams] | None
_MOST_AT_ONCE = 8
_NOT_VARIABLES = ("messages", "tools")


class LLM:
    """A model that answers prompts, with a drafter where there is one.

    Requests of any threads and event loops are decoded together, up to `max_batch` at a time; further ones wait. An
    answer depends on nothing but its prompt and its parameters.

    Parameters
    ----------
    model : str or path
        A directory with config.json and safetensors, a .gguf file, the id of a model on the Hugging Face Hub that is in
        the local cache ("Qwen/Qwen3-8B"), or "smollm2". Nothing is downloaded.
    drafter : str or path, optional
        A drafter, named likewise; "auto" is the installed one for the model, or none, with a warning; "none" or None is
        baseline decoding, which gives the same answers.
    tokenizer : str, path or Tokenizer, optional
        Another model's tokenizer, or a loaded one.
    dtype, device, weights, drafter_weights, native, block_size
        As for Session.load.
    max_batch : int
        Answers that are decoded at the same time.
    max_context : int, optional
        The most tokens of a prompt and its answer together; by default the model's.
    sample_from, rule : str
        As for Decoder.
    status : callable, optional
        status(text) is entered while the named part is loaded.

    Raises
    ------
    TypeError, ValueError
        For wrong arguments, before anything is loaded.
    CheckpointError
        For files that are missing, damaged or unsupported.

    Examples
    --------
    >>> from dflash_decode import LLM
    >>> llm = LLM("smollm2")
    >>> print(llm.chat("Explain what a prime number is in one sentence.", max_tokens=16, stop=" that").text)
    A prime number is a positive integer greater than 1
    """

    def __init__(self, model: str | os.PathLike, drafter: str | os.PathLike | None = AUTO, *,
                 tokenizer: str | os.PathLike | Tokenizer | None = None, dtype: str | torch.dtype = "bfloat16",
                 device: str | torch.device = "cpu", weights: str = "auto", drafter_weights: str = "auto",
                 native: bool = False, block_size: int | None = None, max_batch: int = _MOST_AT_ONCE,
                 max_context: int | None = None, sample_from: str = "greedy", rule: str = "token",
                 status: Callable[[str], AbstractContextManager] = lambda text: nullcontext()):
        how = {"max_batch": whole("LLM", "max_batch", max_batch, 1), "rule": choice("LLM", "rule", rule, Rule),
               "max_context": None if max_context is None else whole("LLM", "max_context", max_context, 1),
               "sample_from": choice("LLM", "sample_from", sample_from, SampleFrom)}
        session = Session.load(model, drafter, block_size=block_size, dtype=dtype, device=device, weights=weights,
                               drafter_weights=drafter_weights, tokenizer=tokenizer, native=native, status=status)
        self._set_up(session, True, how)

    def _set_up(self, session: Session, speculative: bool, how: dict[str, Any]) -> None:
        self.session, self._how = session, how
        drafter = session.drafter if speculative else None
        block = session.block_size if drafter and not session.adapts else None
        self._decoder = Decoder(session.target, drafter, block_size=block, **how)
        self._decoder.ready()
        self._defaults = read_defaults(find_model(session.model))
        self._constraints = Constraints(session.tokenizer, session.target.vocab_size)
        self._engine = Engine(self._decoder)
        self._finalizer = weakref.finalize(self, self._engine.close)  # also when the program ends

    def without_drafter(self) -> "LLM":
        """The same model without speculation: the same answers, one token a step. It shares the weights and has a
        thread and a cache of its own."""
        made = LLM.__new__(LLM)
        made._set_up(self.session, False, self._how)
        return made

    # ---- what it has ----

    @property
    def tokenizer(self) -> Tokenizer:
        return self.session.tokenizer

    @property
    def max_context(self) -> int:
        """The most tokens of a prompt and its answer together, which the cache has room for."""
        pool = self._decoder.pool
        return min(self._decoder.max_context, pool.num_pages * pool.page_size)

    @property
    def defaults(self) -> GenerationParams:
        """What applies where a call names nothing else."""
        return GenerationParams(**vars(self._defaults))

    @property
    def closed(self) -> bool:
        """Whether nothing can be generated any more."""
        return self._engine.closed

    def workload(self) -> Workload:
        """What is running and waiting now."""
        return self._engine.workload()

    def warm_up(self, prompt_lens: Iterable[int] | None = None, params: Params = None) -> None:
        """Does at once what the first answers would wait for: compiles and records the passes that they need.

        Parameters
        ----------
        prompt_lens : iterable of int, optional
            Lengths of the expected prompts, in tokens; by default all that fit.
        params : GenerationParams or SamplingParams, or a list of them, optional
            Of the expected requests; by default all kinds.
        """
        what, many = "LLM.warm_up", isinstance(params, Sequence)
        each = read_params(what, params, {}, len(params) if isinstance(params, Sequence) else 1)
        plans = [self._plan(what, one) for one in each]
        samplings = [sampling for one in plans for sampling in one.samplings] if many or params else None
        self._engine.call(lambda: self._decoder.warm_up(prompt_lens, samplings))

    # ---- answers ----

    def generate(self, prompts: object, params: Params = None, **fields: Any) -> Any:
        """Continues prompts.

        Parameters
        ----------
        prompts : object
            One prompt, or a list of them. A prompt is a text, which is continued as it stands, after the model's BOS
            token if it has one; token ids, as a list or as an array or tensor (n,) or (1, n); or a list of messages,
            as chat takes them.
        params : GenerationParams or SamplingParams, or a list of them, optional
            For all prompts, or one for each.
        **fields
            Fields of GenerationParams, by name, over those of `params`.

        Returns
        -------
        Completion or list of Completion
            One for each prompt, in their order; for one prompt that is not in a list, its completion alone.

        Raises
        ------
        TypeError, ValueError
            For wrong arguments, before anything is decoded.
        GenerationError
            If an answer cannot be finished.

        Examples
        --------
        >>> from dflash_decode import LLM
        >>> llm = LLM("smollm2")
        >>> [found.text for found in llm.generate(["1, 2, 3,", "A, B, C,"], max_tokens=4, stop=",")]
        [' 4', ' D']
        """
        return self._all("LLM.generate", prompts, params, fields, Reading(chat=False))

    def chat(self, messages: object, params: Params = None, *, tools: Iterable[dict] | None = None,
             chat_template_kwargs: Mapping[str, Any] | None = None, **fields: Any) -> Any:
        """Answers messages, through the model's chat template.

        Parameters
        ----------
        messages : object
            A list of messages {"role": ..., "content": ...}, or a text, which is the user's message; or a list of
            either.
        params : GenerationParams or SamplingParams, or a list of them, optional
            As for generate.
        tools : list of dict, optional
            JSON schemas of functions, for the template.
        chat_template_kwargs : dict, optional
            Further names for the template ("enable_thinking").
        **fields
            As for generate.

        Returns
        -------
        Completion or list of Completion
            As generate.

        Raises
        ------
        TypeError, ValueError, GenerationError
            As generate.
        CheckpointError
            If the model has no chat template, or it fails.
        """
        return self._all("LLM.chat", messages, params, fields,
                         _reading("LLM.chat", True, tools, chat_template_kwargs))

    def stream(self, prompt: object, params: Params = None, *, tools: Iterable[dict] | None = None,
               chat_template_kwargs: Mapping[str, Any] | None = None, **fields: Any) -> Iterator[str]:
        """Yields the text of one answer as it is decoded.

        The pieces are whole characters and no part of a stop string; joined, they are the text that generate returns.
        Closing the iterator, as leaving a loop does, ends the request.

        Parameters
        ----------
        prompt : object
            One prompt, as generate takes it.
        params, **fields
            As for generate, with n = 1.
        tools, chat_template_kwargs
            As for chat, where the prompt has messages.
        """
        what = "LLM.stream"
        asked = self._one(what, prompt, params, fields, _reading(what, False, tools, chat_template_kwargs), single=True)
        return Texts(Stream(self, self._engine, self.tokenizer, *asked))

    def submit(self, prompt: object, params: Params = None, *, tools: Iterable[dict] | None = None,
               chat_template_kwargs: Mapping[str, Any] | None = None, **fields: Any) -> Stream:
        """Starts the answers to one prompt and returns at once. The arguments are those of `stream`, and n can be more.

        Returns
        -------
        Stream
            Iterates over `Chunk`s with text, tokens, log probabilities and, at the end, the completion; has `result`
            and `cancel`.
        """
        what = "LLM.submit"
        asked = self._one(what, prompt, params, fields, _reading(what, False, tools, chat_template_kwargs))
        return Stream(self, self._engine, self.tokenizer, *asked)

    async def agenerate(self, prompts: object, params: Params = None, **fields: Any) -> Any:
        """generate, for an event loop."""
        return await self._all_async("LLM.agenerate", prompts, params, fields, Reading(chat=False))

    async def achat(self, messages: object, params: Params = None, *, tools: Iterable[dict] | None = None,
                    chat_template_kwargs: Mapping[str, Any] | None = None, **fields: Any) -> Any:
        """chat, for an event loop."""
        return await self._all_async("LLM.achat", messages, params, fields,
                                     _reading("LLM.achat", True, tools, chat_template_kwargs))

    async def astream(self, prompt: object, params: Params = None, *, tools: Iterable[dict] | None = None,
                      chat_template_kwargs: Mapping[str, Any] | None = None, **fields: Any) -> AsyncIterator[str]:
        """stream, for an event loop."""
        reading = _reading("LLM.astream", False, tools, chat_template_kwargs)
        asked = await self._aside(self._one, "LLM.astream", prompt, params, fields, reading, True)
        stream = AsyncStream(self, self._engine, self.tokenizer, *asked)
        try:
            async for chunk in stream:
                if chunk.text:
                    yield chunk.text
        finally:
            stream.cancel()

    async def asubmit(self, prompt: object, params: Params = None, *, tools: Iterable[dict] | None = None,
                      chat_template_kwargs: Mapping[str, Any] | None = None, **fields: Any) -> AsyncStream:
        """submit, for an event loop."""
        reading = _reading("LLM.asubmit", False, tools, chat_template_kwargs)
        asked = await self._aside(self._one, "LLM.asubmit", prompt, params, fields, reading)
        return AsyncStream(self, self._engine, self.tokenizer, *asked)

    # ---- the end ----

    def close(self) -> None:
        """Ends what runs, with a GenerationError, and the thread of the engine. Nothing can be generated after it."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ----

    def _all(self, what: str, prompts: object, params: Params, fields: Mapping[str, Any], reading: Reading) -> Any:
        streams: list[Stream] = []
        try:
            for ids, planned in self._read(what, prompts, params, fields, reading):
                streams.append(Stream(self, self._engine, self.tokenizer, ids, planned, whole=True))
            found = [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()  # those that an exception leaves behind
        return found[0] if is_single(prompts) else found

    async def _all_async(self, what: str, prompts: object, params: Params, fields: Mapping[str, Any],
                         reading: Reading) -> Any:
        streams: list[AsyncStream] = []
        try:
            for ids, planned in await self._aside(self._read, what, prompts, params, fields, reading):
                streams.append(AsyncStream(self, self._engine, self.tokenizer, ids, planned, whole=True))
            found = [await stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()
        return found[0] if is_single(prompts) else found

    async def _aside(self, read: Callable[..., Any], what: str, prompt: object, params: Params,
                     fields: Mapping[str, Any], *more: object) -> Any:
        """read(...) in another thread: in that of grammars where it will compile one, so that those that wait for a
        slow one leave the event loop's threads to others."""
        asked = params if isinstance(params, Sequence) else [params]
        if any(fields.get(name) is not None or any(getattr(one, name, None) is not None for one in asked)
               for name in COMPILED):
            return await asyncio.wrap_future(self._constraints.submit(read, what, prompt, params, fields, *more))
        return await asyncio.to_thread(read, what, prompt, params, fields, *more)

    def _one(self, what: str, prompt: object, params: Params, fields: Mapping[str, Any],
             reading: Reading, single: bool = False) -> tuple[list[int], Plan]:
        """The tokens and the plan of one prompt. single: it has one answer."""
        if not is_single(prompt):
            raise TypeError(f"{what}: prompt must be one prompt; got {shown(prompt)}")
        (ids, planned), = self._read(what, prompt, params, fields, reading)
        if single and len(planned.samplings) > 1:
            raise ValueError(f"{what}: n must be 1; got {len(planned.samplings)}")
        return ids, planned

    def _read(self, what: str, prompts: object, params: Params, fields: Mapping[str, Any],
              reading: Reading) -> list[tuple[list[int], Plan]]:
        """Prompts and plans, all checked."""
        found = read_prompts(self.tokenizer, self.session.target.vocab_size, prompts, what, reading)
        asked = read_params(what, params, fields, len(found))
        plans = [self._plan(what, one) for one in asked]
        for i, (ids, planned) in enumerate(zip(found, plans, strict=True), 1):
            self._check_room(f"{what}: prompt {i}", len(ids), planned)
        room = self._decoder.max_context
        short = [(one.max_tokens, room - len(ids)) for ids, one in zip(found, asked, strict=True)
                 if one.max_tokens is not None and len(ids) + one.max_tokens > room]
        if short:
            warn(f"max_tokens is {short[0][0]}, but the context of {room} tokens has room for {short[0][1]} after the "
                 "prompt: an answer that gets there ends with the finish reason 'length'")
        return list(zip(found, plans, strict=True))

    def _check_room(self, where: str, prompt: int, planned: Plan) -> None:
        """Raises ValueError for a prompt of so many tokens whose answer can never fit."""
        pool, room = self._decoder.pool, self._decoder.max_context
        if prompt >= room:
            raise ValueError(f"{where} must be shorter than the context of {room} tokens; got {prompt}")
        if prompt + planned.min_tokens > room:
            raise ValueError(f"{where} and min_tokens must fit into the context of {room} tokens; got {prompt} and "
                             f"{planned.min_tokens}")
        if pool.pages_for(needed := min(prompt + planned.max_tokens, room)) > pool.num_pages:
            raise ValueError(f"{where} and its answer must fit into the cache of {pool.num_pages * pool.page_size} "
                             f"tokens; got {needed}")

    def _plan(self, what: str, params: GenerationParams) -> Plan:
        return plan(what, params, self._defaults, self._constraints, self.tokenizer.stop_ids,
                    self.session.target.vocab_size)


def _reading(what: str, chat: bool, tools: Iterable[dict] | None, variables: Mapping[str, Any] | None) -> Reading:
    of_type(what, "chat_template_kwargs", variables, (Mapping, type(None)), "a dict of names for the chat template")
    for name in variables or ():
        if not isinstance(name, str) or name in _NOT_VARIABLES:
            raise TypeError(f"{what}: chat_template_kwargs must be names for the chat template other than "
                            f"{' and '.join(_NOT_VARIABLES)}; got {shown(name)}")
    if isinstance(tools, Iterator):
        tools = list(tools)  # every prompt reads them
    return Reading(chat, tools, variables or {})
