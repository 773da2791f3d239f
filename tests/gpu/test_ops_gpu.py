"""Every op's sample on the GPU against its reference, and a step in a CUDA graph."""

import dataclasses

import pytest
import torch

import dflash_kernels as dk
from dflash_kernels import _library, reference
from dflash_kernels.limits import FP8
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.storage import PackedWeight
from dflash_kernels.testing import assert_within_budget, rotary_table, same_bits
from tests.support.op_samples import SAMPLES, RawCalls, int32, tensors_in

DEVICE = "cuda"
# Arguments that are float32 whatever the model's dtype.
FLOAT32 = {"values", "out_values", "params", "proposal", "adjustments", "out_probs", "out_logprobs", "workspace",
           "lse", "out_lse"}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


class Noted(RawCalls):
    """Notes the calls into the dflash namespace, with their arguments as they were, and runs none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "dflash":
            return func(*args, **(kwargs or {}))
        self.calls.append((func, args))


def moved(value, to, memo):
    """The value with to(...) applied to whole storages, so that views, their strides and canaries stay what they are.
    memo: storages' addresses and what became of them."""
    if isinstance(value, PackedWeight):
        rows = reference.linear.unpack(value.data, value.out_features, value.in_features)
        return dk.pack_weight(to(rows), value.scales)
    if isinstance(value, PagedKV) and value.is_fp8:  # as it is, whatever the model's dtype
        to = torch.clone
    if dataclasses.is_dataclass(value):
        return type(value)(**{name: moved(v, to, memo) for name, v in vars(value).items()})
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, to, memo) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in memo:
        memo[storage.data_ptr()] = to(torch.empty(0, dtype=value.dtype).set_(storage))
    return memo[storage.data_ptr()].as_strided(value.shape, value.stride(), value.storage_offset())


def floats_to(dtype):
    return lambda t: t.to(dtype, copy=True) if t.is_floating_point() and t.dtype != FP8 else t.clone()


def with_rows(func, args):
    """The call with its weight in rows, as a GPU has it: the blocks that were noted are the CPU's."""
    if "out_features" not in [a.name for a in func._schema.arguments] or args[1].dim() == 2:
        return args
    x, blocks, scales, format, bias, n, *rest = args
    return (x, reference.linear.unpack(blocks, n, x.shape[1]).contiguous(), scales, format, bias, n, *rest)


@pytest.mark.parametrize("name", [n for n in SAMPLES if SAMPLES[n].written and n != "linear_blocks"])  # a CPU's alone
def test_sample_matches_reference(name, dtype):
    sample, memo = SAMPLES[name], {}
    arguments = sample.arguments()
    with Noted() as noted:
        sample.function(**{n: v if n in FLOAT32 else moved(v, floats_to(dtype), memo)
                           for n, v in arguments.items()})
    assert noted.calls
    for func, args in noted.calls:
        args = with_rows(func, args)
        by_reference = _library.REFERENCES[func._schema.name.split("::")[1]]
        scratch = [a.untyped_storage().data_ptr() for a, named in zip(args, func._schema.arguments, strict=True)
                   if named.name == "workspace"]
        truth, peer, got = {}, {}, {}
        by_reference(*moved(args, floats_to(torch.float64), truth))
        by_reference(*moved(args, torch.clone, peer))
        func(*moved(args, lambda t: t.clone().to(DEVICE), got))
        for at, (want, like, found) in enumerate(zip(truth.values(), peer.values(), got.values(), strict=True)):
            if list(truth)[at] in scratch:
                continue
            if want.is_floating_point():
                assert_within_budget(found.cpu(), want, like, name=f"storage {at}")
            else:
                assert torch.equal(found.cpu(), like), f"storage {at}"


class Step:
    """A draft layer, the head, a verification against given ids, and the accepted rows' context K/V."""

    B, Q, H, HEADS, D, PAGE, V = 3, 4, 64, 4, 32, 4, 96

    def __init__(self, dtype, device):
        torch.manual_seed(1)
        make = lambda *shape: torch.randn(shape).to(dtype).to(device)  # noqa: E731
        h, d, qkv = self.H, self.D, (self.HEADS + 2) * self.D
        self.embedding, self.norms, self.k_weights = make(self.V, h), make(3, h), make(1, d)
        self.weights = [make(n, k) / k**0.5 for n, k in ((qkv, h), (h, self.HEADS * d), (256, h), (h, 128),
                                                         (self.V, h), (2 * d, h))]
        self.table = rotary_table(d, 64).to(device)
        self.cache = PagedKV(*(make(12, self.PAGE, 1, d) for _ in range(2)))
        self.anchors, self.target = torch.zeros(self.B).long().to(device), torch.zeros(self.B, self.Q).long().to(device)
        self.lens, self.widths = (torch.zeros(self.B).int().to(device) for _ in range(2))
        self.pages = torch.zeros(self.B, 4).int().to(device)

    def set(self, seed):
        """Other lengths (one request is padding), pages, tokens and cache contents, in place."""
        torch.manual_seed(seed)
        self.lens.copy_(int32(*torch.randint(0, 9, (self.B,)).tolist()))
        self.widths.copy_(int32(self.Q, seed % self.Q, 0).roll(seed))
        self.pages.copy_(torch.randperm(12).view(self.B, 4))
        self.anchors.copy_(torch.randint(0, self.V, (self.B,)))
        self.target.copy_(torch.randint(0, self.V, (self.B, self.Q)))
        for t in (self.cache.k, self.cache.v):
            t.copy_(torch.randn(t.shape))
        return self

    def run(self):
        (qkv_w, o_w, up_w, down_w, head_w, kv_w), d = self.weights, self.D
        block = dk.prepare_block(self.anchors, self.lens, self.Q, 5, page_table=self.pages, page_size=self.PAGE,
                                 block_lens=self.widths, embedding=self.embedding)
        x, positions = block.rows.view(-1, self.H), block.positions.view(-1)
        qkv = dk.linear(dk.rms_norm(x, self.norms[0]), qkv_w)
        dk.qk_norm_rope(qkv, positions, self.table, num_heads=self.HEADS, num_kv_heads=1, head_dim=d,
                        k_weight=self.k_weights[0])
        q, k, v = qkv.view(self.B, self.Q, -1, d).split([self.HEADS, 1, 1], 2)
        attended = torch.zeros(self.B, self.Q, self.HEADS, d, dtype=x.dtype, device=x.device)
        dk.block_attention(q, k, v, self.cache, self.pages, self.lens, block_lens=self.widths, window=(5, -1),
                           out=attended)
        h, x = dk.add_rms_norm(dk.linear(attended.flatten(0, 1).flatten(1), o_w), x, self.norms[1])
        h, x = dk.add_rms_norm(dk.linear(dk.silu_and_mul(dk.linear(h, up_w)), down_w), x, self.norms[2])
        ids, values = dk.lm_head_argmax(h, head_w)
        verified = dk.verify_greedy(ids.view(self.B, self.Q), self.target, self.lens, block_lens=self.widths)
        dk.write_context_kv(dk.linear(x, kv_w), positions, block.slots.view(-1), [self.cache],
                            k_weights=self.k_weights, cos_sin=self.table, commit_lens=verified.commit_lens)
        return [*tensors_in(block), qkv, attended, h, x, ids, values, *tensors_in(verified), *tensors_in(self.cache)]


def test_a_captured_step_follows_lengths_tables_and_tokens_that_change(dtype):
    step, alone = Step(dtype, DEVICE), Step(dtype, DEVICE)
    step.set(0).run()  # compiles, and puts the caches' addresses on the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step.run()
    for seed in range(1, 5):
        step.set(seed)
        graph.replay()
        for at, (got, want) in enumerate(zip(outputs, alone.set(seed).run(), strict=True)):
            assert same_bits(got, want), f"output {at} at seed {seed}"


def test_a_step_equals_the_cpu_s():
    gpu, cpu = (Step(torch.float32, device).set(7).run() for device in (DEVICE, "cpu"))
    for at, (got, want) in enumerate(zip(gpu, cpu, strict=True)):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3, msg=lambda m, at=at: f"output {at}: {m}")


def test_capture_before_the_caches_are_known_says_what_to_do(monkeypatch):
    monkeypatch.setattr("dflash_kernels._triton.context._bases", {})
    kv, cache = torch.zeros(1, 16, device=DEVICE), PagedKV(*torch.zeros(2, 1, 1, 1, 8, device=DEVICE))
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        dk.write_context_kv(kv, zero, zero, [cache], cos_sin=None)


def askew(t):
    """The same values one element further: nothing that is loaded from it is aligned."""
    return torch.empty(t.shape[0], t.shape[1] + 3, dtype=t.dtype, device=t.device)[:, 1:-2].copy_(t)


@pytest.mark.parametrize("width", [100, 576, 4096, 10_000])
def test_a_normed_row_has_the_same_bits_at_any_alignment_and_alone(dtype, width):
    x, weight = torch.randn(9, width, device=DEVICE).to(dtype), torch.randn(width, device=DEVICE).to(dtype)
    want = dk.rms_norm(x, weight)
    assert same_bits(dk.rms_norm(askew(x), weight), want)
    assert same_bits(dk.rms_norm(x[4:5], weight), want[4:5])
    zeros = torch.zeros_like(x)
    assert same_bits(dk.add_rms_norm(x, zeros, weight)[0], want)


@pytest.mark.parametrize("dim,rotary", [(64, 64), (128, 64), (128, 128), (256, 256), (20, 6)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_key_has_the_same_bits_in_the_context_in_a_block_and_at_any_alignment(dtype, dim, rotary, interleaved):
    kv, weight = (torch.randn(n, device=DEVICE).to(dtype) for n in ((5, 6 * dim), (1, dim)))
    positions, table = torch.arange(30, 35, device=DEVICE), rotary_table(rotary, 64).to(DEVICE)
    options = dict(num_heads=0, num_kv_heads=3, head_dim=dim, k_weight=weight[0], interleaved=interleaved)
    block, skew = (dk.qk_norm_rope(t, positions, table, **options) for t in (kv.clone(), askew(kv)))
    cache = PagedKV(*torch.zeros(2, 5, 1, 3, dim, dtype=dtype, device=DEVICE))
    dk.write_context_kv(kv, positions, torch.arange(5, device=DEVICE), [cache], k_weights=weight, cos_sin=table,
                        interleaved=interleaved)
    assert same_bits(block, skew)
    assert same_bits(cache.k.flatten(1), block[:, :3 * dim].contiguous())
    assert same_bits(cache.v.flatten(1), kv[:, 3 * dim:].contiguous())
