"""Sampled verification against the same in torch: softmax, top-k and top-p by a sort, min-p, multinomial.

Bytes count the rows that must be read: up to the first rejection of each request, and one more where a whole block is
accepted. Torch's expression works on all rows of the batch, as the engines' do.
"""

from types import SimpleNamespace

import torch

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes
from dflash_kernels.ops import sample

FILTERS = {"no filters": {}, "top-k, top-p": {"top_k": 50, "top_p": 0.9},
           "top-k, top-p, min-p": {"top_k": 50, "top_p": 0.9, "min_p": 0.02}, "top-p alone": {"top_p": 0.9}}
TEMPERATURE = 0.8


# requests, width, vocabulary
GEOMETRIES = {"cpu": {"smollm2": (8, 8, 49152), "qwen3-8b": (8, 8, 151936)},
              "cuda": {"qwen3-8b": (8, 8, 151936), "qwen3-8b, 64 requests": (64, 8, 151936)},
              "tiny": {"tiny": (1, 2, 100)}}


def cases(sizes: Sizes):
    for shape in GEOMETRIES[sizes.name].values():
        for name, filters in FILTERS.items():
            yield sample_case(sizes, *shape, name, filters)


def params_of(requests, filters):
    dtypes = {"top_k": torch.int32}
    return dk.SamplingTensors(torch.full((requests,), TEMPERATURE), torch.arange(requests), **{
        n: torch.full((requests,), v, dtype=dtypes.get(n, torch.float32)) for n, v in filters.items()})


def filtered_distribution(logits, top_k=None, top_p=None, min_p=None):
    p = (logits.float() / TEMPERATURE).softmax(-1)
    if min_p is not None:
        p = torch.where(p >= min_p * p.amax(-1, keepdim=True), p, 0.0)
    if top_k is not None or top_p is not None:
        ordered, order = p.sort(-1, descending=True)
        if top_k is not None:
            ordered[..., top_k:] = 0.0
        if top_p is not None:
            above = ordered.cumsum(-1) - ordered
            ordered = torch.where(above < top_p * ordered.sum(-1, keepdim=True), ordered, 0.0)
        p = torch.zeros_like(p).scatter_(-1, order, ordered)
    return p / p.sum(-1, keepdim=True)


def sample_case(sizes, requests, width, vocab, name, filters):
    """Logits whose most likely token has about half of the probability and is the draft, so that some are rejected."""
    copies = sizes.copies_of(requests * width * vocab * 2)
    logits = [torch.randn(requests, width, vocab).mul_(2).to(sizes.dtype) for _ in range(copies)]
    drafts = torch.randint(0, vocab, (copies, requests, width))
    for x, d in zip(logits, drafts, strict=True):
        x.scatter_(2, d.roll(-1, 1)[..., None], TEMPERATURE * 15.0)
    lens, params = torch.full((requests,), 100, dtype=torch.int32), params_of(requests, filters)
    made = dk.verify_sample(drafts[0], logits[0], lens, params)
    memory = torch.empty(sample.workspace_size(requests, width, vocab))
    rows = sum(int(dk.verify_sample(d, x, lens, params).commit_lens.sum())
               for d, x in zip(drafts, logits, strict=True)) / copies

    def run(i):
        dk.verify_sample(drafts[i], logits[i], lens, params, out=made, workspace=memory)
        return made.commit_lens, made.tokens

    def expression(x, d):
        p = filtered_distribution(x, **filters)
        y = (p / torch.empty_like(p).exponential_()).argmax(-1)  # multinomial, which would wait for the GPU to check p
        return (d[:, 1:] == y[:, :-1]).long().cumprod(1).sum(1) + 1, y

    def check(got):
        """Every draw is another, so what is compared is whether it can be drawn at all."""
        p = filtered_distribution(logits[0], **filters)
        for b, n in enumerate(got[0].tolist()):
            assert (p[b, range(n), got[1][b, :n]] > 0).all(), f"request {b}: a token that cannot be drawn"

    problem = SimpleNamespace(expression=expression, args=lambda i: (logits[i], drafts[i]))
    read = round(rows)
    return Case("verify_sample", f"{requests} x {width} x {vocab}, {name}", run,
                cost.sample_bytes(requests, width, vocab, 2, rows=read), copies,
                cost.sample_flops(requests, width, vocab, rows=read), sizes.peers_of("verify_sample", problem), check,
                headline=sizes.device == "cpu" and vocab == 49152 and name in ("no filters", "top-k, top-p")
                or sizes.device == "cuda" and requests == 8)
