"""Sampled requests, and what baseline decoding answers to them."""

from dflash_decode.requests import Request
from dflash_decode.sampling import GREEDY, SamplingParams
from tests.support.decode_runs import PROMPTS, run

SAMPLINGS = [
    SamplingParams(0.8, seed=1),
    GREEDY,
    SamplingParams(1.3, top_k=20, seed=2),
    SamplingParams(0.7, top_p=0.9, seed=3),
    SamplingParams(1.0, min_p=0.05, seed=4),
    GREEDY,
    SamplingParams(1.0, 30, 0.95, 0.01, 5),
    SamplingParams(2.0, seed=1),
]


def requests(samplings=SAMPLINGS, n=24):
    return [Request(i, p, n - i % 3, (), s) for i, (p, s) in enumerate(zip(PROMPTS, samplings, strict=True))]


def texts(found):
    return {key: value[:2] for key, value in found.items()}


def without_drafter(target, wanted):
    """Each request alone, token by token."""
    return texts(run(target, None, wanted, max_batch=1, max_context=80))
