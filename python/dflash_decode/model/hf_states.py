"""Recurrent and convolution states of transformers' models, beside the pages of the layers that attend.

A mixer (linear attention, a state-space model, a short convolution) turns the state before some tokens into the state
after them. States of the tokens in between do not exist, and a step does not know which of its drafts will be accepted.
So a request's states stay before the block of the last pass, beside the block's inputs of every mixer. The next pass
knows the tokens that were accepted: each mixer first runs over their inputs, which moves its state to the last
committed token, and then over the new block on a copy. A rejected draft never enters a state, and a step is one pass of
the model. Where all of a block was accepted, and after each part of a prompt, the copy is the new state as it is.
"""

import copy
import inspect
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dflash_kernels import PagedKV

from ..checkpoint.errors import brief

KINDS = ("linear_attention", "conv", "hybrid")  # of layers with a state; a hybrid one attends too
UNBOUNDED = (0.0, float("inf"))  # time steps
_NOISE = 0.1  # of what a lost state changes: more is no rounding
current = threading.local()  # its `value` is the pass that runs in this thread


@dataclass
class _Run:
    """A mixer's last run: its state before and after the block, and the block's inputs (1, n, H)."""

    before: Any
    after: Any
    inputs: torch.Tensor


@dataclass
class Block:
    """A request's block of `count` tokens after `context` tokens. previous: the block before. fresh: the empty states
    of all layers, for a request that begins."""

    page: int
    context: int
    count: int
    previous: "Block | None"
    fresh: Sequence[Any] = ()
    runs: "dict[torch.nn.Module, _Run]" = field(default_factory=dict)


class _Mixer:
    """The forward function of a mixer: transformers' own, but within a pass of a target."""

    def __init__(self, module: Any):
        self.module, self.forward = module, module.forward
        names = inspect.signature(module.forward).parameters
        self.cache = "cache_params" if "cache_params" in names else "past_key_values"
        self.continues = True

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        now = getattr(current, "value", None)
        if now is None:
            return self.forward(hidden_states, *args, **kwargs)
        out = torch.zeros_like(hidden_states)
        for b, block in enumerate(now.blocks):
            if block is not None:
                out[b, :block.count] = self._block(block, hidden_states[b:b + 1, :block.count])[0]
        return out

    def _block(self, block: Block, inputs: torch.Tensor) -> torch.Tensor:
        state = self._committed(block)
        after = copy.deepcopy(state)
        out = self._run(inputs, after)
        block.runs[self.module] = _Run(state, after, inputs.clone())  # a view would keep all requests' rows
        return out

    def _committed(self, block: Block) -> Any:
        """The state before the block."""
        if block.previous is None:
            return block.fresh[self.module.layer_idx]
        last, accepted = block.previous.runs[self.module], block.context - block.previous.context
        if accepted == block.previous.count:
            return last.after
        state = copy.deepcopy(last.before)
        if accepted:
            self._run(last.inputs[:, :accepted], state)
        return state

    def _run(self, inputs: torch.Tensor, state: Any) -> torch.Tensor:
        from transformers.cache_utils import Cache

        layers = [state] * (self.module.layer_idx + 1)  # a mixer reads its own
        one_by_one = not self.continues and any(state.has_previous_state.values())
        parts = inputs.split(1, 1) if one_by_one else (inputs,)
        found = [self.forward(part, **{self.cache: Cache(layers=layers)}) for part in parts]
        if not all(isinstance(one, torch.Tensor) for one in found):
            raise NotImplementedError(f"HFTarget: {type(self.module).__name__} must return hidden states alone, to "
                                      f"keep a state; got a {type(found[0]).__name__}")
        return torch.cat(found, 1)

    @torch.inference_mode()
    def find_out(self, config: Any) -> None:
        """Whether several tokens at once continue a state. In transformers some mixers begin anew then (Mamba-1)."""
        weight = next(self.module.parameters())
        inputs = torch.randn((1, 8, config.hidden_size), generator=torch.Generator().manual_seed(0)).to(weight)
        whole, anew, both = (_fresh(config)[self.module.layer_idx] for _ in range(3))
        try:
            want, lost = (self._run(part, state)[:, -4:] for part, state in ((inputs, whole), (inputs[:, 4:], anew)))
            self._run(inputs[:, :4], both)
            got = self._run(inputs[:, 4:], both)
        except NotImplementedError:
            raise
        except (RuntimeError, TypeError) as error:
            raise NotImplementedError(f"HFTarget: {type(self.module).__name__} must take hidden states alone, to keep "
                                      f"a state; got {brief(error)}") from error
        self.continues = bool((got - want).abs().max() < _NOISE * (lost - want).abs().max())


def _fresh(config: Any) -> Sequence[Any]:
    """The empty states of all layers."""
    from transformers import DynamicCache

    return DynamicCache(config=config).layers


class States:
    """The states of all requests of a model. Its mixers' forward functions are replaced, once and permanently.

    The classes of Nemotron-H and Zamba2 put a floor under the time steps of several tokens at once and not of one
    (https://github.com/huggingface/transformers/pull/48989). It is removed, as in vLLM: output would depend on how
    tokens are cut into passes.
    """

    def __init__(self, model: Any):
        self._config = model.config.get_text_config()
        self._blocks: weakref.WeakKeyDictionary[PagedKV, dict[int, Block]] = weakref.WeakKeyDictionary()
        found: dict[type, bool] = {}
        for module in mixers(model):
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = UNBOUNDED
            if not isinstance(module.forward, _Mixer):
                module.forward = mixer = _Mixer(module)
                if type(module) not in found:
                    mixer.find_out(self._config)
                mixer.continues = found.setdefault(type(module), mixer.continues)

    def blocks(self, cache: PagedKV, page_table: torch.Tensor, context_lens: torch.Tensor,
               block_lens: torch.Tensor) -> list[Block | None]:
        """The blocks of a pass over these pages; None for a row of no request. A request is known by its first page."""
        known = self._blocks.setdefault(cache, {})
        found: list[Block | None] = []
        for page, context, count in zip(page_table[:, 0].tolist(), context_lens.tolist(), block_lens.tolist(),
                                        strict=True):
            previous = known.get(page) if context else None
            if not count:
                found.append(None)
            elif not context:
                found.append(Block(page, 0, count, None, _fresh(self._config)))
            elif previous is None or not previous.context <= context <= previous.context + previous.count:
                got = "none" if previous is None else f"{previous.context} to {previous.context + previous.count}"
                raise RuntimeError(f"HFTarget: states must be of the {context} tokens before the block; got {got}")
            else:
                found.append(Block(page, context, count, previous))
        return found

    def keep(self, cache: PagedKV, blocks: Sequence[Block | None]) -> None:
        """The blocks of a pass that is done."""
        for block in blocks:
            if block is not None:
                block.previous, block.fresh = None, ()
        self._blocks[cache] |= {block.page: block for block in blocks if block is not None}


def mixers(model: Any) -> Iterator[Any]:
    """The modules that take and leave a state through transformers' cache."""
    return (module for module in model.modules() if hasattr(module, "layer_idx")
            and "update_conv_state(" in inspect.getsource(type(module)))
