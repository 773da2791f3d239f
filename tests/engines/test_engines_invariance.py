"""What VLLM_BATCH_INVARIANT asks for: a request's numbers have the same bits alone and in any batch. Each op behind a
hook and behind an IR op is called as the hook calls it, in bfloat16, for all requests and for one."""

import pytest
import torch

from dflash_engines.dflash2 import convolve
from dflash_engines.vllm import hooks, ir_ops, verify, verify_v2
from dflash_kernels import PagedKV, block_attention, lm_head_argmax, pack_weight, select_candidates, write_context_kv
from dflash_kernels.testing import same_bits

B, Q, HIDDEN, HEADS, DIM, VOCAB, PAGE = 5, 8, 576, 3, 64, 999, 16
LENS = torch.tensor([3, 200, 17, 64, 129], dtype=torch.int32)
TABLE = torch.randperm(B * 13).int().view(B, 13)


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


def context_kv():
    kv, cos_sin, weights = drawn(B, 2 * 2 * HEADS * DIM), drawn(64, DIM), drawn(2, DIM)

    def call(at):
        caches = [PagedKV(*(torch.zeros(B, PAGE, HEADS, DIM, dtype=kv.dtype) for _ in "kv")) for _ in range(2)]
        where = torch.arange(B)[at]
        write_context_kv(kv[at], where + 7, where * PAGE, caches, k_weights=weights, cos_sin=cos_sin, rounding="each")
        return [t[where, 0] for cache in caches for t in (cache.k, cache.v)]

    return call


def attention():
    q, k, v = drawn(B, Q, 3 * HEADS, DIM), drawn(B, Q, HEADS, DIM), drawn(B, Q, HEADS, DIM)
    cache = PagedKV(*(drawn(B * 13, PAGE, HEADS, DIM) for _ in "kv"))
    return lambda at: [block_attention(q[at], k[at], v[at], cache, TABLE[at], LENS[at], scale=0.125)]


def draft_head():
    states, weight = drawn(B, HIDDEN), pack_weight(drawn(VOCAB, HIDDEN))
    return lambda at: lm_head_argmax(states[at], weight, num_valid=VOCAB - 9)


def verify_():
    logits, bonus = drawn(B, Q, VOCAB, dtype=torch.float32), torch.arange(B)[:, None]
    drafts = logits.argmax(-1)
    drafts[1, 3] += 1
    return lambda at: [verify.verify(drafts[at], logits[at], bonus[at])]


def verify_v2_():
    logits, positions = 5 * drawn(B, Q, VOCAB, dtype=torch.float32), torch.arange(Q) + LENS[:, None]
    block, temperature = logits.argmax(-1).roll(1, 1), torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0])

    def call(at):
        found = verify_v2.verify(logits[at], block[at], positions[at], temperature[at], torch.arange(B)[at], "token")
        return found.tokens, found.commit_lens

    return call


def grouped_conv():
    x, delta, base = drawn(B, Q, HIDDEN), drawn(B, Q, 2, HIDDEN // 16), drawn(2, HIDDEN)

    def call(at):
        return [convolve(x[at].flatten(0, 1), delta[at].flatten(0, 1), base, Q).unflatten(0, (-1, Q))]

    return call


def selector():
    ids = torch.stack([torch.randperm(VOCAB)[:16] for _ in range(B * Q)]).view(B, Q, 16)
    values, hidden, tables = drawn(B, Q, 16, dtype=torch.float32), drawn(B, Q, 64), [drawn(VOCAB, 64) for _ in "ps"]
    values = values.sort(-1, descending=True).values
    return lambda at: [select_candidates(values[at].contiguous(), ids[at].contiguous(), hidden[at],
                                         torch.arange(B)[at], *tables, LENS[at])[0]]


def norms():
    x, residual, weight = drawn(B, HIDDEN), drawn(B, HIDDEN), drawn(HIDDEN)

    def call(at):
        return ir_ops.rms_norm(x[at], weight, 1e-6), *ir_ops.fused_add_rms_norm(x[at].clone(), residual[at].clone(),
                                                                                weight, 1e-6)

    return call


CASES = {"context_kv": context_kv, "attention": attention, "draft_head": draft_head, "verify": verify_,
         "verify_v2": verify_v2_, "grouped_conv": grouped_conv, "selector": selector, "IR ops": norms}


def test_every_hook_is_among_them():
    assert {*CASES} == {"IR ops", *(hook.name for hook in hooks())}


@pytest.mark.parametrize("name", CASES)
def test_a_request_has_the_same_bits_alone_and_in_the_batch(name):
    torch.manual_seed(3)
    call = CASES[name]()
    together = call(slice(None))
    assert all(len(t) == B for t in together)
    for at in range(B):
        for alone, among in zip(call(slice(at, at + 1)), together, strict=True):
            assert same_bits(alone, among[at:at + 1])
    backwards = torch.arange(B).flip(0)
    for other, among in zip(call(backwards), together, strict=True):
        assert same_bits(other, among[backwards])
