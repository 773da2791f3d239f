"""One compiled kernel serves every batch: what triton would compile anew for is the same for any number of rows,
requests, drafts and pages."""

import inspect
from collections import defaultdict

import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import dflash_kernels as dk
from dflash_kernels import LogitAdjustments, PagedKV, Proposal, SamplingTensors, _triton
from dflash_kernels.testing import rotary_table
from tests.support.op_samples import int32

HIDDEN, VOCABULARY, HEADS, DIM, PAGE = 32, 1056, 4, 16, 16
# (requests, block, pages of the table): 1 in each place, multiples of 16, and neither
SIZES = ((1, 1, 1), (1, 8, 3), (3, 5, 16), (16, 16, 40), (2, 17, 33))


class Launched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "dflash":
            return func(*args, **(kwargs or {}))
        return _triton.load(_triton.LAUNCHERS[func._schema.name.split("::")[1]])(*args, **(kwargs or {}))


def rows(b, q, pages):
    x = torch.randn(b * q, HIDDEN)
    dk.linear(x, torch.randn(48, HIDDEN))
    dk.rms_norm(x, torch.randn(HIDDEN))
    dk.silu_and_mul(x)
    blocks, delta, base = x.view(b, q, HIDDEN), torch.randn(b, q, 2, 2), torch.randn(2, HIDDEN)
    dk.grouped_conv(blocks, delta, base)
    dk.grouped_conv_add_rms_norm(blocks, delta, base, torch.randn_like(blocks), base[0])
    dk.lm_head_argmax(x, torch.randn(VOCABULARY, HIDDEN))
    dk.lm_head_topk(x, torch.randn(VOCABULARY, HIDDEN), 4)
    routed = dk.route_experts(torch.randn(b * q, 8), 2)
    dk.expert_mlp(x, torch.randn(8, 48, HIDDEN), torch.randn(8, HIDDEN, 24), *routed)
    dk.combine_argmax(torch.randn(2, b * q), torch.arange(2 * b * q).view(2, -1))
    dk.combine_topk(torch.randn(2, b * q, 4), torch.arange(8 * b * q).view(2, -1, 4), torch.randn(2, b * q))


def narrow(b, q, pages):
    """Of few outputs, which with some numbers of rows make multiples of 16."""
    dk.linear(torch.randn(b * q, HIDDEN), torch.randn(8, HIDDEN))
    dk.linear(torch.randn(b * q, 4096), torch.randn(8, 4096))


def block(b, q, pages):
    table, lens = torch.arange(b * pages, dtype=torch.int32).view(b, pages), torch.full((b,), 3, dtype=torch.int32)
    embedding = torch.randn(40, HIDDEN)
    made = dk.prepare_block(torch.arange(b), lens, q, 9, page_table=table, page_size=PAGE, embedding=embedding)
    dk.embed_tokens(made.ids, embedding)


def rope(b, q, pages):
    tokens, positions = b * q, torch.arange(b * q)
    cos_sin = rotary_table(DIM, max(size[0] * size[1] for size in SIZES))
    caches = [PagedKV(*torch.randn(2, 64, PAGE, 2, DIM)) for _ in range(2)]
    dk.write_context_kv(torch.randn(tokens, 2 * 2 * 2 * DIM), positions, positions, caches, cos_sin=cos_sin,
                        commit_lens=torch.ones(b, dtype=torch.int32))
    dk.write_context_kv(torch.randn(tokens, 2 * 2 * 2 * DIM), positions, positions.expand(2, -1).contiguous(), caches,
                        cos_sin=cos_sin)
    dk.qk_norm_rope(torch.randn(tokens, (HEADS + 4) * DIM), positions, cos_sin, num_heads=HEADS, num_kv_heads=2,
                    head_dim=DIM)


def attention(b, q, pages):
    cache = PagedKV(*torch.randn(2, max(size[0] * size[2] for size in SIZES), PAGE, 2, DIM))
    table, lens = torch.arange(b * pages, dtype=torch.int32).view(b, pages), torch.full((b,), 5, dtype=torch.int32)
    dk.block_attention(torch.randn(b, q, HEADS, DIM), torch.randn(b, q, 2, DIM), torch.randn(b, q, 2, DIM), cache,
                       table, lens)


def verify(b, q, pages):
    drafts, lens, logits = torch.ones(b, q, dtype=torch.int64), torch.full((b,), 5, dtype=torch.int32), torch.randn(
        b, q, VOCABULARY)
    dk.verify_greedy(drafts, drafts, lens)
    dk.verify_greedy(drafts, None, lens, logits=logits)
    params = SamplingTensors(torch.full((b,), 0.7), torch.arange(b), int32(*[5] * b), torch.full((b,), 0.9), None)
    bias = torch.zeros(b, 1, VOCABULARY).expand(b, q, VOCABULARY)
    dk.verify_sample(drafts, logits, lens, params, adjustments=LogitAdjustments(bias=bias))
    if q > 1:
        ids, probs = torch.arange(16).expand(b, q - 1, 16).contiguous(), torch.full((b, q - 1, 16), 1 / 16)
        dk.sample_draft(probs, ids, lens, params)
        codebook, hidden = torch.randn(40, 32), torch.randn(b, q - 1, 32)
        for given in (None, params):
            dk.select_candidates(probs, ids, hidden, drafts[:, 0], codebook, codebook, lens, given)
        dense = torch.full((b, q - 1, VOCABULARY), 1 / VOCABULARY)
        for proposal in (Proposal(probs=probs, ids=ids), Proposal(probs=dense), Proposal(logits=dense)):
            dk.verify_sample(drafts, logits, lens, params, proposal=proposal, rule="block")


def specialised(kernel, args, kwargs):
    """A kernel and which of its arguments are None; what triton's key has of its integers: which are 1, which divide
    by 16."""
    given = inspect.signature(kernel.fn).bind_partial(
        *args, **{name: value for name, value in kwargs.items() if name in kernel.arg_names}).arguments
    left = kernel.kwargs["do_not_specialize"] or ()
    assert set(left) <= set(kernel.arg_names)
    absent = [name for name, value in given.items() if value is None]
    return " without ".join([kernel.fn.__name__, *absent]), {
        name: (value == 1, value % 16 == 0) for name, value in given.items()
        if type(value) is int and name not in left and kernel.fn.__annotations__.get(name) is not tl.constexpr}


@pytest.mark.parametrize("ops", [rows, narrow, block, rope, attention, verify])
def test_no_kernel_is_compiled_anew_for_another_batch(ops, monkeypatch):
    keys = defaultdict(list)

    def note(kernel, *args, grid, warmup, **kwargs):
        name, key = specialised(kernel, args, kwargs)
        keys[name].append(key)

    monkeypatch.setattr(InterpretedFunction, "run", note)
    for size in SIZES:
        with Launched():
            ops(*size)
    assert keys
    for kernel, (first, *others) in keys.items():
        differ = {name for key in others for name in key if key[name] != first[name]}
        assert others and not differ, f"{kernel} is compiled anew as {sorted(differ)} change"
