"""Inputs and comparisons that the tests of verify_sample share."""

import torch

from dflash_kernels import Proposal, SamplingTensors
from dflash_kernels.testing import same_bits
from tests.support.sample_margin import FIELDS

KINDS = ("one_hot", "sparse", "dense", "logits")
FILTERS = ("baseline", "top_k", "top_p", "min_p", "all")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def params(b, temperature=1.0, **filters):
    dtypes = {"top_k": torch.int32}
    return SamplingTensors(torch.full((b,), temperature), torch.arange(b) * 77 + 5,
                          **{n: torch.full((b,), v, dtype=dtypes.get(n, torch.float32)) for n, v in filters.items()})


def proposal(kind, logits, seed=0):
    """Something like the target, in one of its forms."""
    b, q, v = logits.shape
    head = logits[:, 1:].float().nan_to_num(0, 0, 0) * 0.8
    head = head + torch.randn(b, q - 1, v, generator=torch.Generator().manual_seed(seed))
    if kind == "one_hot":
        return None
    if kind == "logits":
        return Proposal(logits=head.to(logits.dtype))
    if kind == "dense":
        return Proposal(probs=head.softmax(-1))
    top = head.topk(min(8, v))
    return Proposal(probs=top.values.softmax(-1), ids=top.indices)


def block(logits, rank=1):
    """A block whose drafts are the target's `rank`-th choice."""
    b, q, v = logits.shape
    likely = logits[:, :-1].float().topk(min(rank, v)).indices[..., -1]
    return torch.cat([torch.zeros(b, 1, dtype=torch.int64), likely], 1)


def same(got, want):
    for f in FIELDS:
        assert same_bits(getattr(got, f), getattr(want, f)), (f, getattr(got, f), getattr(want, f))


def one_of(p, n):
    return type(p)(**{name: None if t is None else t[:n] for name, t in vars(p).items()})


def some_params(b, filters="all", greedy_every=0, seed=0, temperature=(0.5, 1.5)):
    """Parameters that differ from request to request."""
    assert filters in FILTERS
    draw = torch.Generator().manual_seed(seed)
    temp = torch.empty(b).uniform_(*temperature, generator=draw)
    if greedy_every:
        temp[::greedy_every] = 0.0
    on = {"baseline": (), "all": ("top_k", "top_p", "min_p")}.get(filters, (filters,))
    return SamplingTensors(
        temp, torch.randint(-2**63, 2**63 - 1, (b,), generator=draw),
        torch.randint(0, 60, (b,), generator=draw).int() if "top_k" in on else None,
        torch.rand(b, generator=draw).mul(1.1) if "top_p" in on else None,
        torch.rand(b, generator=draw).pow(3) * 0.3 if "min_p" in on else None)
