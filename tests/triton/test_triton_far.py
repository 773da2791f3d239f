"""Tensors whose elements lie more than 2**31 apart: 128 requests of 32k tokens, or logits of 1,024 rows of a vocabulary
of 248,320 as a view. Most of the memory is never touched, so that most of it never exists."""

import pytest
import torch

from dflash_kernels import Verified
from dflash_kernels._triton import (
    activation,
    attention,
    block,
    context,
    linear,
    norm,
    rope,
    sample,
)
from dflash_kernels._triton import (
    lm_head as head,
)
from dflash_kernels._triton import (
    lm_head_topk as head_topk,
)
from dflash_kernels._triton.verify import verify_greedy
from dflash_kernels.ops.sample import workspace_size
from dflash_kernels.testing import rotary_table, same_bits
from tests.kernels.test_verify import FIELDS
from tests.support.attention_cases import Case
from tests.support.op_samples import int32, verified
from tests.triton.test_triton_sample import problem

F16, APART = torch.float16, 1 << 30  # a stride that fits in 32 bits, and twice which does not


@pytest.fixture(scope="module")
def storage():
    try:
        return torch.empty(2 * APART + (1 << 16), dtype=F16)
    except RuntimeError as error:
        pytest.skip(f"4 GB of addresses are not to be had: {error}")


@pytest.fixture
def far(storage):
    """far(t, dim=0): t's values with the elements of a dimension APART apart, at most three of them."""
    def place(t, dim=0):
        strides, inner = list(t.stride()), t.stride()[dim]
        strides[dim] = APART
        for other in range(dim):  # those outside of it move inwards
            strides[other] //= t.shape[dim]
        view = storage.as_strided(t.shape, strides)
        assert t.is_contiguous() and t.shape[dim] == 3 and inner * max(t.shape[:dim], default=1) <= 1 << 16
        return view.copy_(t)

    return place


def random(*shape):
    return torch.randn(shape).to(F16)


def test_rows_of_norm_activation_and_rope(far):
    weight, x, out = random(40), random(3, 40), torch.empty(2, 3, 40, dtype=F16)
    norm.rms_norm(x, weight, 1e-6, out[0])
    norm.rms_norm(far(x), weight, 1e-6, out[1])
    assert same_bits(out[1], out[0])
    activation.silu_and_mul(x, out[0, :, :20])
    activation.silu_and_mul(far(x), out[1, :, :20])
    assert same_bits(out[1], out[0])
    qkv, table = random(3, 3 * 16), rotary_table(16, 8)
    turned = far(qkv)
    for t in (turned, qkv):
        rope.qk_norm_rope(t, torch.arange(3), table, None, None, None, None, None, None, None, 1, 1, 16, 1e-6, False,
                          True)
    assert same_bits(turned.contiguous(), qkv)


def test_pages_and_heads_that_are_written(far):
    kv, positions, slots, table = random(3, 32), torch.arange(3), torch.tensor([5, 0, 2]), rotary_table(16, 8)
    near = [torch.zeros(3, 2, 1, 16, dtype=F16) for _ in "kv"]
    write = lambda kv, k, v: context.write_context_kv(  # noqa: E731
        kv, positions, slots, [k], [v], [], [], None, table, None, 1e-6, 1.0, False, True)
    write(kv, *near)
    for which in range(2):  # one of the two caches far, then the rows
        caches = [far(torch.zeros_like(t)) if i == which else torch.zeros_like(t) for i, t in enumerate(near)]
        write(kv, *caches)
        assert all(same_bits(a.contiguous(), b) for a, b in zip(caches, near, strict=True))
    again = [torch.zeros_like(t) for t in near]
    write(far(kv), *again)
    assert all(same_bits(a, b) for a, b in zip(again, near, strict=True))


@pytest.mark.parametrize("which", ["k", "v"])
def test_pages_that_are_read(far, which):
    case = Case([5], width=2, heads=2, kv_heads=1, dim=16, page=5, dtype=F16)
    case.table[0, 0] = 2
    near = {name: random(3, 5, 1, 16) for name in "kv"}
    answers = []
    for caches in (near, near | {which: far(near[which])}):
        out = torch.zeros_like(case.q)
        attention.block_attention(case.q, case.block(case.k), case.block(case.v), caches["k"], caches["v"], None, None,
                                  case.table, case.lens, None, None, None, case.width, 0.25, False, -1, -1, None, 0.0,
                                  out)
        answers.append(out)
    assert same_bits(*answers)


def test_requests_and_rows_of_attention(far):
    q, k, v = random(3, 3, 1, 16), random(3, 3, 1, 16), random(3, 3, 1, 16)
    answers = []
    for dim in (None, 0, 1):
        out = torch.zeros_like(q)
        attention.block_attention(q if dim is None else far(q, dim), k, v, None, None, None, None, None,
                                  int32(0, 0, 0), None, None, None, q.shape[1], 0.25, False, -1, -1, None, 0.0, out)
        answers.append(out)
    assert same_bits(answers[1], answers[0]) and same_bits(answers[2], answers[0])


def test_weights_and_embeddings(far):
    x, w = random(3, 16), random(3, 16)
    out = [torch.empty(3, 3, dtype=F16) for _ in range(3)]
    for into, a, b in zip(out, (x, far(x), x), (w, w, None), strict=True):
        linear.linear(a, far(w) if b is None else b, None, 0, None, 3, into)
    assert same_bits(out[1], out[0]) and same_bits(out[2], out[0])
    ids, values, sums = torch.empty(3, 2).long(), torch.empty(3, 2), torch.empty(3)
    head.lm_head_argmax(x, far(w), None, 0, None, 3, 3, 1.0, 0.0, 0, ids[:, 0], values[:, 0])
    assert torch.equal(ids.flatten()[:3], out[0].float().argmax(1))
    head_topk.lm_head_topk(x, far(w), None, 0, None, 3, 3, 1.0, 0.0, 0, ids, values, sums)
    assert torch.equal(values, out[0].float().topk(2).values)
    rows = torch.empty(1, 3, 16, dtype=F16)
    block.embed_tokens(torch.tensor([[2, 0, 1]]), far(w), 0, rows)
    assert same_bits(rows[0], w[[2, 0, 1]])


@pytest.mark.parametrize("dim", [0, 1])
def test_logits(far, dim):
    logits, drafts, lens = random(3, 3, 70), torch.randint(0, 70, (3, 3)), int32(1, 2, 3)
    answers = []
    for given in (logits, far(logits, dim)):
        out = verified(3, 3)
        verify_greedy(drafts, None, given, lens, None, *(getattr(out, f) for f in FIELDS))
        answers.append(Verified(*(getattr(out, f).clone() for f in FIELDS)))
        arguments = problem(70, dtype=F16, logits=given, draft_ids=drafts)
        sample.verify_sample(*arguments.values(), *(getattr(out, f) for f in FIELDS),
                             torch.empty(workspace_size(3, 3, 70)))
        answers.append(out)
    for a, b in zip(answers[:2], answers[2:], strict=True):
        assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)
