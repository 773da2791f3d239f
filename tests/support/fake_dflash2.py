"""DFlash2 as both engines call it, written for the tests: their names, shapes and roundings, in plain loops."""

import sys
import types

import torch
from torch import nn

VOCAB, RANK, K, HIDDEN, GROUP, TAPS = 60, 24, 5, 48, 16, 2
LIBRARY = torch.library.Library("vllm", "FRAGMENT")
LIBRARY.define("dflash2_grouped_conv(Tensor x, Tensor delta, Tensor base, int block_size, int group_size) -> Tensor")
CALLS: list[str] = []  # of the engines' own functions


def convolved(x, delta, base, block, group):
    """Row by row in float64, rounded once."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for row in range(len(x)):
        for tap in range(min(len(base), row % block + 1)):
            own = delta[row, tap].double().repeat_interleave(group)
            out[row] += (base[tap].double() + own) * x[row - tap].double()
    return out.to(x.dtype)


def edges(ids, values, hidden, anchors, predecessor, successor):
    """(B, n, K, K): of each candidate behind each of the position before."""
    before = torch.cat([anchors.long()[:, None, None].expand_as(ids[:, :1]), ids[:, :-1]], 1)
    step = predecessor[before] * hidden[:, :, None]
    return values[:, :, None] + (step.float() @ successor[ids].float().transpose(-1, -2)).to(hidden.dtype).float()


def walked(ids, scores, choose):
    """The drafts (B, n), and the scores (B, n, K) that each was chosen from: by choose(scores of b at i, b, i)."""
    tokens, seen = torch.zeros_like(ids[..., 0]), torch.zeros(ids.shape)
    for b in range(len(ids)):
        place = 0
        for i in range(ids.shape[1]):
            seen[b, i] = scores[b, i, place]
            place = int(choose(seen[b, i], b, i))
            tokens[b, i] = ids[b, i, place]
    return tokens, seen


def greedy(scores, _b, _i):
    return scores.argmax()


class CandidateSelector(nn.Module):
    """Codebooks and a projection, of both engines."""

    def __init__(self, dtype=torch.float32, k=K):
        super().__init__()
        generator, self.top_k = torch.Generator().manual_seed(3), k
        for name in ("predecessor_codebook", "successor_codebook"):
            table = torch.randn(VOCAB, RANK, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(table, requires_grad=False))
        self.hidden_projection = nn.Linear(HIDDEN, RANK, bias=False, dtype=dtype)
        weight = torch.randn(RANK, HIDDEN, generator=generator) / HIDDEN ** 0.5
        self.hidden_projection.weight = nn.Parameter(weight.to(dtype), requires_grad=False)

    def scores(self, ids, values, states, anchors):
        return edges(ids, values, self.hidden_projection(states), anchors, self.predecessor_codebook,
                     self.successor_codebook)


# vLLM's


class VllmSelector(CandidateSelector):
    def forward(self, candidate_ids, unary_logits, hidden_states, anchor_token_ids):
        return self.scores(candidate_ids, unary_logits, hidden_states, anchor_token_ids)


def dflash2_grouped_conv_impl(x, delta, base, block_size, group_size):
    CALLS.append("conv")
    return convolved(x, delta, base, block_size, group_size)


LIBRARY.impl("dflash2_grouped_conv", dflash2_grouped_conv_impl, "CPU")


def kernel():
    """Stands where an engine has a Triton kernel or a helper, for its source alone."""


class CandidateSampler:
    def sample(self, candidate_ids, scores, num_reqs, sample_pos, idx_mapping, temperature, seeds, draft_tokens,
               draft_logits, use_fp64):
        CALLS.append("walk")
        draft_tokens[:num_reqs] = walked(candidate_ids, scores, greedy)[0]


class DFlash2Speculator:
    """By what is there after its model is loaded. The base class's initialiser is the proposer's."""

    def load(self, selector, most=4, width=4):
        self.model = types.SimpleNamespace(model=types.SimpleNamespace(candidate_selector=selector))
        self.draft_tokens = torch.full((most, width - 1), -1)
        self.input_buffers = types.SimpleNamespace(input_ids=torch.arange(most * width, dtype=torch.int32) % VOCAB)
        self.num_query_per_req, self.draft_logits, self.enable_adaptive_verification = width, None, False
        self.candidate_sampler = sys.modules[type(self).__module__].CandidateSampler()
        return self

    def _generate_draft(self, ids, values, states):
        scores = self._score_candidates(ids, values, states)
        self.candidate_sampler.sample(ids, scores, len(ids), None, None, None, None, self.draft_tokens,
                                      self.draft_logits, False)

    def _score_candidates(self, candidate_ids, unary_logits, hidden_states):
        CALLS.append("scores")
        width = self.num_query_per_req
        anchors = self.input_buffers.input_ids[:candidate_ids.shape[0] * width:width]
        return self.model.model.candidate_selector(candidate_ids, unary_logits, hidden_states, anchors)


def vllm_modules(speculator):
    """By name, for a test's own vLLM. speculator: the class that its DFlash2Speculator derives from."""
    path = "vllm.v1.worker.gpu.spec_decode.dflash2.speculator"
    made = type("DFlash2Speculator", (DFlash2Speculator, speculator), {"__module__": path})
    for name in ("_generate_draft", "_score_candidates"):  # on the class itself, as the engine's
        setattr(made, name, vars(DFlash2Speculator)[name])
    return {"vllm.model_executor.models.qwen3_dflash2": {
                "dflash2_grouped_conv_impl": dflash2_grouped_conv_impl, "_dflash2_grouped_conv_kernel": kernel,
                "_grouped_conv": kernel, "_score_edges": kernel,
                "CandidateSelector": type("CandidateSelector", (VllmSelector,), {})},
            path.rpartition(".")[0]: {},
            path: {"DFlash2Speculator": made, "_selector_walk_kernel": kernel,
                   "CandidateSampler": type("CandidateSampler", (CandidateSampler,), {})}}


# SGLang's


class DFlashGroupedConv:
    def __init__(self, block, dtype=torch.float32):
        generator, self.block_size = torch.Generator().manual_seed(2), block
        self.base_kernel = torch.randn(2, TAPS, HIDDEN, generator=generator).to(dtype)

    def _convolve(self, hidden_states, delta, side):
        CALLS.append("conv")
        return convolved(hidden_states, delta, self.base_kernel[side], self.block_size, GROUP)


class SglangSelector(CandidateSelector):
    def build_lattice(self, *, candidate_ids, unary_logits, hidden_states, anchor_token_ids):
        CALLS.append("scores")
        return self.scores(candidate_ids, unary_logits, hidden_states, anchor_token_ids)

    def sample_path(self, *, candidate_ids, scores, uniforms, temperatures, greedy_mask):
        CALLS.append("walk")

        def share(row, b):
            if greedy_mask[b]:
                return torch.nn.functional.one_hot(row.argmax(), len(row)).float()
            return (row / temperatures[b]).softmax(-1)

        def choose(row, b, i):
            return (uniforms[b, i] >= share(row, b).cumsum(-1)).sum().clamp_max(len(row) - 1)

        tokens, seen = walked(candidate_ids, scores, choose)
        return tokens, torch.stack([torch.stack([share(row, b) for row in rows]) for b, rows in enumerate(seen)])


def sglang_modules():
    models, worker = "sglang.srt.models.dflash", "sglang.srt.speculative.dflash_worker_v2"
    walk = "sglang.kernels.ops.speculative.dflash"
    return {models: {"DFlashGroupedConv": type("DFlashGroupedConv", (DFlashGroupedConv,), {}), "_grouped_conv": kernel,
                     "CandidateSelector": type("CandidateSelector", (SglangSelector,), {}), "_score_edges": kernel},
            walk: {"selector_walk_triton": kernel, "_selector_walk_kernel": kernel},
            worker: {"_selector_lattice": kernel, "_SelectorDraftSampler": type("S", (), {"__call__": kernel}),
                     "DFlashWorkerV2": type("W", (), {"_propose_selector_block": kernel})}}


def candidates(requests, drafted=3, dtype=torch.float32, k=K):
    """ids, values, hidden states of a step."""
    ids = torch.stack([torch.randperm(VOCAB)[:k] for _ in range(requests * drafted)]).view(requests, drafted, k)
    return ids, torch.randn(requests, drafted, k), torch.randn(requests, drafted, HIDDEN).to(dtype)
