"""Verifies drafted blocks: which tokens are accepted, and the token that follows them.

There are three verifiers: argmax without logits in memory, sampling from logits, and sampling from adjusted logits. A
batch uses the cheapest that serves all its requests. Each gives a request the output that a cheaper one would give.
"""

import math
from collections.abc import Sequence

import torch

from dflash_kernels import (
    LogitAdjustments,
    Proposal,
    SamplingTensors,
    Verified,
    embed_tokens,
    verify_greedy,
    verify_sample,
)

from .adjust import Adjuster, GrammarFailed
from .model import Target
from .requests import Live
from .sampling import SamplingParams

_FIELDS = {"temperature": "temperature", "seeds": "seed", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def verifier_for(samplings: Sequence[SamplingParams]) -> type["GreedyVerifier"]:
    """The cheapest verifier for these settings."""
    if any(sampling.adjusts for sampling in samplings):
        return AdjustedVerifier
    return SampledVerifier if any(sampling.temperature > 0 for sampling in samplings) else GreedyVerifier


def first_token(verifier: "GreedyVerifier", live: Live, row: torch.Tensor) -> int:
    """The token after the prompt. row (1, H): the target's hidden state of the last prompt token."""
    prompt = live.request.prompt
    ids = torch.tensor([[prompt[-1]]], device=row.device)
    before = torch.tensor([len(prompt) - 1], dtype=torch.int32, device=row.device)
    verifier.seat([live])
    token = int(verifier.run(row, ids, before).bonus)
    verifier.seat(())
    return token


class Memory:
    """Memory of passes that run one after another. rows: the most that one has."""

    def __init__(self, rows: int, device: torch.device):
        self.rows, self.device = rows, device
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """(B, Q, ...) with at most `rows` blocks' tokens: the same memory for each of a name."""
        if name not in self._kept:
            self._kept[name] = torch.zeros((self.rows, *shape[2:]), dtype=dtype, device=self.device)
        return self._kept[name][:math.prod(shape[:2])].view(shape)


class GreedyVerifier:
    """Accepts the drafts that greedy decoding would have written. memory: of others that never run meanwhile."""

    graph_safe = packs = True
    params: SamplingTensors | None = None

    def __init__(self, target: Target, batch: int, width: int, rule: str = "token", memory: Memory | None = None):
        self.target, self.rule, self.device = target, rule, target.device
        self.memory = memory or Memory(batch * width, self.device)
        self.out = Verified.empty(batch, width, device=self.device)
        self._make(batch, width)

    def _per_request(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _make(self, batch, width):
        self.next_ids = self._per_request((batch, width), torch.int64)
        self.packed = self._per_request(batch * width, torch.int64)
        self.values = self._per_request(batch * width, torch.float32)

    def seat(self, requests: Sequence[Live]) -> None:
        """Sets the requests of the batch, in order; the rest is empty."""

    def run(self, rows: torch.Tensor, ids: torch.Tensor, context_lens: torch.Tensor,
            block_lens: torch.Tensor | None = None, proposal: Proposal | None = None,
            order: torch.Tensor | None = None) -> Verified:
        """rows (B * Q, H): the target's hidden states of the blocks ids (B, Q). proposal: how drafts were sampled.

        order (B, Q) int64, of a verifier without logits: the row of each token, and rows (T, H), T <= B * Q; -1 for no
        token.
        """
        found = self.next_ids.view(-1) if order is None else self.packed[:len(rows)]
        self.target.next_ids(rows, found, self.values[:len(rows)])
        if order is not None:
            embed_tokens(order, found[:, None], out=self.next_ids[..., None])
        return verify_greedy(ids, self.next_ids, context_lens, block_lens=block_lens, out=self.out)


class SampledVerifier(GreedyVerifier):
    """Accepts drafts so that the output follows the target's distribution under each request's settings.

    rule: "token" or "block", as for verify_sample.
    """

    packs = False
    adjustments: LogitAdjustments | None = None

    def _make(self, batch, width):
        self.params: SamplingTensors
        self.logits = self.memory.take("logits", batch, width, self.target.vocab_size, dtype=self.target.dtype)
        self.params = SamplingTensors(
            temperature=self._per_request(batch, torch.float32), seeds=self._per_request(batch, torch.int64),
            top_k=self._per_request(batch, torch.int32), top_p=self._per_request(batch, torch.float32),
            min_p=self._per_request(batch, torch.float32))

    def seat(self, requests: Sequence[Live]) -> None:
        for into, name in _FIELDS.items():
            tensor = getattr(self.params, into).zero_()
            values = [getattr(live.sampling, name) for live in requests]
            tensor[:len(values)].copy_(torch.tensor(values, dtype=tensor.dtype))

    def run(self, rows: torch.Tensor, ids: torch.Tensor, context_lens: torch.Tensor,
            block_lens: torch.Tensor | None = None, proposal: Proposal | None = None,
            order: torch.Tensor | None = None) -> Verified:
        self.target.logits(rows, self.logits.view(rows.shape[0], -1))
        return verify_sample(ids, self.logits, context_lens, self.params, proposal=proposal, rule=self.rule,
                             adjustments=self.adjustments, block_lens=block_lens, out=self.out)


class AdjustedVerifier(SampledVerifier):
    """Adjusts the logits by penalties, biases and grammars before it accepts.

    A row's adjustments depend on the drafts before it, which are read between drafting and verifying, so the step is
    not recorded. A request fails if its grammar raises or allows no token; its row is then ignored. Where the grammar
    allows no token after some of the drafts, the block ends before them, and the request fails only if its answer gets
    there, in the next step, as it would without drafts. A drawn draft is offered all the same, since its chance to be
    offered must not depend on its value; if it is accepted, nothing is drawn after it. A grammar that has raised at a
    draft is asked about no more drafts of that answer: it may bear only so much.
    """

    graph_safe = False

    def _make(self, batch, width):
        super()._make(batch, width)
        bias = self.memory.take("bias", batch, width, self.target.vocab_size, dtype=torch.float32)
        self.adjuster = Adjuster(bias)
        self.adjustments = self.adjuster.adjustments
        self.requests: list[Live] = []

    def seat(self, requests: Sequence[Live]) -> None:
        super().seat(requests)
        self.requests = list(requests)

    def run(self, rows: torch.Tensor, ids: torch.Tensor, context_lens: torch.Tensor,
            block_lens: torch.Tensor | None = None, proposal: Proposal | None = None,
            order: torch.Tensor | None = None) -> Verified:
        lens = torch.full_like(context_lens, ids.shape[1]) if block_lens is None else block_lens.clone()
        ends: list[tuple[int, int]] = []
        for b, (live, block) in enumerate(zip(self.requests, ids.tolist(), strict=False)):
            if live.finish is None:
                asked = live.request
                try:
                    drafts = block[1:min(int(lens[b]), live.room)]
                    usable = self.adjuster.fill(b, live.sampling, asked.prompt, live.text, drafts, asked.stop_tokens)
                except GrammarFailed as error:
                    live.fail(str(error))
                    continue
                live.wary |= usable.raised
                drawn = proposal is not None and live.sampling.temperature > 0 and usable.cut
                lens[b].clamp_(max=usable.rows + drawn)
                if drawn:
                    ends.append((b, usable.rows))
        verified = super().run(rows, ids, context_lens, lens, proposal)
        for b, drafts in ends:
            if verified.accept_lens[b] == drafts:
                verified.commit_lens[b] -= 1
                verified.new_lens[b] -= 1
                verified.tokens[b, drafts] = -1
                verified.bonus[b] = verified.tokens[b, drafts - 1]
        return verified


VERIFIERS = (GreedyVerifier, SampledVerifier, AdjustedVerifier)
