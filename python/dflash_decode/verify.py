"""What the target says of a drafted block: which of its tokens stay, and what comes after them.

There are three ways, and a batch goes the cheapest that serves all its requests: argmax with no logits in memory; draws
from logits; logits that are adjusted first. A later one gives a request the text that an earlier one would.
"""

from collections.abc import Sequence

import torch

from dflash_kernels import LogitAdjustments, Proposal, SamplingTensors, Verified, verify_greedy, verify_sample

from .adjust import Adjuster, GrammarFailed
from .model import Target
from .requests import Live
from .sampling import SamplingParams

_FIELDS = {"temperature": "temperature", "seeds": "seed", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def verifier_for(samplings: Sequence[SamplingParams]) -> type["GreedyVerifier"]:
    """The least that these settings need."""
    if any(sampling.adjusts for sampling in samplings):
        return AdjustedVerifier
    return SampledVerifier if any(sampling.temperature > 0 for sampling in samplings) else GreedyVerifier


def first_token(verifier: "GreedyVerifier", live: Live, row: torch.Tensor) -> int:
    """The token after the prompt; row (1, H): what the target's pass gave for the prompt's last token."""
    prompt = live.request.prompt
    ids = torch.tensor([[prompt[-1]]], device=row.device)
    before = torch.tensor([len(prompt) - 1], dtype=torch.int32, device=row.device)
    verifier.seat([live])
    token = int(verifier.run(row, ids, before).bonus)
    verifier.seat(())
    return token


class GreedyVerifier:
    """Accepts what greedy decoding would have written."""

    graph_safe = True
    params: SamplingTensors | None = None

    def __init__(self, target: Target, batch: int, width: int, rule: str = "token"):
        self.target, self.rule, self.device = target, rule, target.device
        self.out = Verified.empty(batch, width, device=self.device)
        self._make(batch, width)

    def _per_request(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _make(self, batch, width):
        self.next_ids = self._per_request((batch, width), torch.int64)
        self.values = self._per_request(batch * width, torch.float32)

    def seat(self, requests: Sequence[Live]) -> None:
        """The requests of the batch, first to last; the rest is empty."""

    def run(self, rows: torch.Tensor, ids: torch.Tensor, context_lens: torch.Tensor,
            block_lens: torch.Tensor | None = None, proposal: Proposal | None = None) -> Verified:
        """rows (B * Q, H), what the target's pass gave for the blocks ids (B, Q); proposal: how drafts were drawn."""
        self.target.next_ids(rows, self.next_ids.view(-1), self.values)
        return verify_greedy(ids, self.next_ids, context_lens, block_lens=block_lens, out=self.out)


class SampledVerifier(GreedyVerifier):
    """Accepts so that what is emitted follows the target's distribution, each request's by its own settings. rule:
    "token" or "block", as for verify_sample."""

    adjustments: LogitAdjustments | None = None

    def _make(self, batch, width):
        self.params: SamplingTensors
        self.logits = torch.zeros((batch, width, self.target.vocab_size), dtype=self.target.dtype, device=self.device)
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
            block_lens: torch.Tensor | None = None, proposal: Proposal | None = None) -> Verified:
        self.target.logits(rows, self.logits.view(rows.shape[0], -1))
        return verify_sample(ids, self.logits, context_lens, self.params, proposal=proposal, rule=self.rule,
                             adjustments=self.adjustments, block_lens=block_lens, out=self.out)


class AdjustedVerifier(SampledVerifier):
    """What a row may emit depends on the drafts before it, so they are read between drafting and verifying: such a step
    is not recorded. A request whose grammar raises, or lets nothing follow, has failed, and what its row says counts
    for nothing. Where nothing may follow some of the drafts, the block ends before: only an answer that comes there
    fails, in the next step, as it would with no drafts."""

    graph_safe = False

    def _make(self, batch, width):
        super()._make(batch, width)
        self.adjuster = Adjuster(batch, width, self.target.vocab_size, self.device)
        self.adjustments = self.adjuster.adjustments
        self.requests: list[Live] = []

    def seat(self, requests: Sequence[Live]) -> None:
        super().seat(requests)
        self.requests = list(requests)

    def run(self, rows: torch.Tensor, ids: torch.Tensor, context_lens: torch.Tensor,
            block_lens: torch.Tensor | None = None, proposal: Proposal | None = None) -> Verified:
        lens = torch.full_like(context_lens, ids.shape[1]) if block_lens is None else block_lens.clone()
        for b, (live, block) in enumerate(zip(self.requests, ids.tolist(), strict=False)):
            if live.finish is None:
                asked = live.request
                try:
                    lens[b].clamp_(max=self.adjuster.fill(b, live.sampling, asked.prompt, live.text, block[1:],
                                                          asked.stop_tokens))
                except GrammarFailed as error:
                    live.fail(str(error))
        return super().run(rows, ids, context_lens, lens, proposal)


VERIFIERS = (GreedyVerifier, SampledVerifier, AdjustedVerifier)
