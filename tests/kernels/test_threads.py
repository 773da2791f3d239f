"""Every op with 1, 2 and 3 threads: the work is shared out differently, and no bit changes. Sizes are such that every
thread gets some, and that shares end inside a row where they can."""

import pytest
import torch

import dflash_kernels as dk
from dflash_kernels.testing import same_bits
from tests.kernels.test_context import Case as ContextCase
from tests.kernels.test_experts import problem
from tests.kernels.test_rope import make
from tests.support.attention_cases import Case, ints


def of(found):
    """All tensors of a result."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for t in (found if isinstance(found, tuple) else vars(found).values()) if isinstance(t, torch.Tensor)]


def embedded(dtype):
    table, ids = torch.randn(500, 256).to(dtype), torch.randint(-3, 503, (40, 30))
    return lambda: dk.embed_tokens(ids, table)


def prepared(dtype):
    embedding, anchors, lens = torch.randn(500, 256).to(dtype), torch.randint(0, 500, (40,)), ints(*range(40))
    table = torch.arange(40 * 20, dtype=torch.int32).view(40, 20)
    return lambda: dk.prepare_block(anchors, lens, 8, 1, page_table=table, page_size=4, embedding=embedding)


def tied(dtype):
    """The largest value is in the rows of two threads, of which the first is right."""
    x, w = torch.randn(8, 64).to(dtype), torch.randn(4000, 64).to(dtype)
    w[3900] = w[10] = 9 * x[0]
    packed = dk.pack_weight(w)
    return lambda: dk.lm_head_argmax(x, packed)


def verified(dtype, requests):
    logits = torch.randn(requests, 8, 40000 // requests).to(dtype)
    logits[:, :, 7] = logits[:, :, -3] = logits.max() + 1
    drafts = torch.full((requests, 8), 7)
    lens = torch.zeros(requests, dtype=torch.int32)
    return lambda: dk.verify_greedy(drafts, None, lens, logits=logits)


def rotated(dtype):
    qkv, args = make(dtype, 200, 5, 2, 64, 64)
    return lambda: dk.qk_norm_rope(qkv.clone(), **args)


def context(dtype):
    case = ContextCase(dtype, 25, layers=3, page_size=16)  # by 2 and by 3 threads, a share ends inside a token
    return case.run


def combined(dtype):
    values, ids = torch.randn(3, 500, 16).sort(-1, descending=True).values, torch.randint(0, 999, (3, 500, 16))
    lse = torch.randn(3, 500)
    return lambda: (*dk.combine_topk(values, ids, lse),
                    *dk.combine_argmax(values[..., 0].contiguous(), ids[..., 0].contiguous()))


def sampled(dtype):
    values, ids = torch.randn(60, 7, 16).sort(-1, descending=True).values, torch.randint(0, 999, (60, 7, 16))
    params = dk.SamplingTensors(torch.rand(60) + 0.2, torch.arange(60))
    lens = torch.arange(60, dtype=torch.int32)
    return lambda: dk.sample_draft(values, ids, lens, params)


def normed(dtype):
    x, residual, weight = torch.randn(300, 512).to(dtype), torch.randn(300, 512).to(dtype), torch.randn(512).to(dtype)
    return lambda: (dk.rms_norm(x, weight), *dk.add_rms_norm(x.clone(), residual.clone(), weight))


def activated(dtype):
    x = torch.randn(300, 1024).to(dtype)
    return lambda: dk.silu_and_mul(x)


CALLS = {
    "embed_tokens": embedded, "prepare_block": prepared, "lm_head_argmax": tied, "qk_norm_rope": rotated,
    "write_context_kv": context, "combine": combined, "sample_draft": sampled, "norms": normed,
    "verify_greedy, one request": lambda dtype: verified(dtype, 1),
    "verify_greedy, many": lambda dtype: verified(dtype, 20),
    "silu_and_mul": activated,
}


@pytest.mark.parametrize("op", CALLS)
def test_threads_change_no_bit(isa, dtype, by_threads, op):
    first, *others = map(of, by_threads(CALLS[op](dtype)))
    assert first and all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_the_first_of_two_equal_values_wins_whichever_threads_have_them(isa, dtype, by_threads):
    call = tied(dtype)
    assert [int(ids[0]) for ids, _ in by_threads(call)] == [10] * 3


# One request with a long context is shared out by parts of its context.
@pytest.mark.parametrize("options", [
    {"causal": True, "window": (300, -1)}, {"window": (300, 300)}, {"causal": True, "window": (128, -1)},
    {"sinks": torch.linspace(-2, 5, 6), "causal": True}, {"context_starts": ints(400)},
    {"context_starts": ints(400), "window": (350, 2)},
], ids=["causal window", "window", "short window", "sinks", "starts", "starts and window"])
def test_attention_shared_out_by_context(isa, dtype, by_threads, options):
    case = Case([1100], width=8, dtype=dtype)
    want, found = case.check(**options), by_threads(lambda: case.run(**options))
    assert all(same_bits(one, want) for one in found)


def test_experts_of_several_portions_and_tiles(isa, dtype, by_threads):
    x, gate_up, down, ids, weights, biases = problem(dtype, 5, 2100, 600, 3, 2)
    packed = dk.pack_experts(gate_up), dk.pack_experts(down)
    first, *others = by_threads(lambda: dk.expert_mlp(x, *packed, ids, weights, **biases))
    assert all(same_bits(first, other) for other in others)
    want = dk.expert_mlp(x, gate_up, down, ids, weights, **biases)
    assert same_bits(first, want)


@pytest.mark.parametrize("kv_heads", [1, 3, 5])
def test_key_heads_that_threads_cannot_share_evenly(isa, dtype, by_threads, kv_heads):
    """The last heads' rows are cut; of one request's 32 or, where it has fewer, of some."""
    for contexts in ([250], [400]):
        case = Case(contexts, width=8, heads=4 * kv_heads, kv_heads=kv_heads, dtype=dtype)
        case.check(causal=True)
        one, *others = by_threads(lambda case=case: case.run(causal=True))
        assert all(same_bits(other, one) for other in others)
        short = {"causal": True, "block_lens": ints(6)}
        one, *others = by_threads(lambda case=case, short=short: case.run(**short)[:, :6].contiguous())
        assert all(same_bits(other, one) for other in others)
