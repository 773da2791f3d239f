"""One small valid call of every public op, for the tests that go through all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dflash_kernels as dk
from dflash_kernels import _library
from dflash_kernels.limits import FP8
from dflash_kernels.paged_kv import PagedKV
from dflash_kernels.storage import PackedExperts, PackedWeight
from dflash_kernels.types import LogitAdjustments, PreparedBlock, Proposal, SamplingTensors, Verified

CANARY = 77
RECORDS = (PagedKV, PreparedBlock, Verified, PackedWeight, PackedExperts, SamplingTensors, Proposal, LogitAdjustments)


@dataclass(frozen=True)
class Sample:
    function: Callable
    arguments: Callable[[], dict]  # fresh tensors, by keyword
    written: tuple[str, ...]  # arguments that the op writes


def boxed(*shape, dtype=torch.float32):
    """An output inside a larger tensor of canaries."""
    return torch.full([n + 4 for n in shape], CANARY, dtype=dtype)[tuple(slice(2, 2 + n) for n in shape)]


def filled(*shape, dtype=torch.float32):
    t = boxed(*shape, dtype=dtype)
    return t.copy_(torch.randn(shape))


def blocks(requests, width, hidden):
    """Blocks of rows at one stride, inside a larger tensor of canaries."""
    return boxed(requests * width, hidden).copy_(torch.randn(requests * width, hidden)).view(requests, width, hidden)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def ids(*shape, high=10):
    return torch.randint(0, high, shape)


def pages(num_pages=4, page=4, heads=1, dim=8):
    k, v = filled(num_pages, page, heads, dim), filled(num_pages, page, heads, dim)
    return PagedKV(k, v)


def fp8_pages(num_pages=4, page=4, heads=1, dim=8):
    k, v = (filled(num_pages, page, heads, dim).to(FP8) for _ in range(2))
    return PagedKV(k, v, torch.tensor(0.5), torch.rand(heads) + 0.5)


def tables(max_pages=2):
    return torch.arange(2 * max_pages, dtype=torch.int32).view(2, max_pages)


def verified(b, q):
    ints = [boxed(b, dtype=torch.int32) for _ in range(3)]
    return Verified(ints[0], ints[1], boxed(b, q, dtype=torch.int64), boxed(b, dtype=torch.int64), ints[2])


def prepared(b, q, h):
    return PreparedBlock(*(boxed(b, q, dtype=torch.int64) for _ in range(3)), boxed(b, q, h))


def sampling(b):
    temp, shares = torch.linspace(0.0, 1.0, b), torch.linspace(0.5, 1.0, b)
    return SamplingTensors(temp, torch.arange(b), int32(*range(3, 3 + b)), shares, shares * 0.1)


def q4_1_rows(n, k):
    """Rows of q4_1, with scales of a weight's size."""
    rows = torch.randint(0, 256, (n, k // 32, 20), dtype=torch.uint8)
    rows[..., :4] = torch.rand(n, k // 32, 2).half().view(torch.uint8)
    return rows.view(n, -1)


def candidates():
    """Three of ten tokens for each of two positions of two requests, and codebooks of rank 6."""
    return {"values": torch.randn(2, 2, 3).sort(-1, descending=True).values, "ids": torch.randperm(10)[:3].expand(
                2, 2, 3).contiguous(), "hidden": torch.randn(2, 2, 6), "anchor_ids": ids(2),
            "predecessor": torch.randn(10, 6), "successor": torch.randn(10, 6), "context_lens": int32(5, 2)}


def int4_layer(shape):
    """8 outputs of 128 k, as 4-bit checkpoints have them."""
    words = [torch.randint(-2**31, 2**31, size, dtype=torch.int32) for size in (shape, (1, 1))]
    return {"qweight": words[0], "qzeros": words[1], "scales": torch.rand(1, 8).half()}


def int8_weight(n, k):
    return dk.pack_weight(*dk.quantize_weight(torch.randn(n, k)))


def experts(count, n, k, int8=False):
    if not int8:
        return dk.pack_experts(torch.randn(count, n, k))
    quantized = [dk.quantize_weight(torch.randn(n, k)) for _ in range(count)]
    return dk.pack_experts([w for w, _ in quantized], torch.stack([scales for _, scales in quantized]))


def routed(**more):
    """Three rows and two of the four experts 1 to 4 each; the last slot is of another rank."""
    return {"x": torch.randn(3, 16), **more, "ids": int32(1, 4, 3, 1, 2, 0).view(3, 2), "weights": torch.rand(3, 2),
            "first_expert": 1, "num_experts": 6, "out": boxed(3, 16)}


DRAFT, TARGET = [[1, 2, 3], [1, 2, 3]], [[2, 3, 4], [2, 9, 4]]

SAMPLES = {
    "rms_norm": Sample(dk.rms_norm, lambda: {
        "x": torch.randn(3, 16), "weight": torch.randn(16), "eps": 1e-5, "out": boxed(3, 16)}, ("out",)),
    "add_rms_norm": Sample(dk.add_rms_norm, lambda: {
        "x": torch.randn(3, 16), "residual": filled(3, 16), "weight": torch.randn(16), "eps": 1e-5,
        "out": boxed(3, 16), "residual_out": boxed(3, 16)}, ("residual", "out", "residual_out")),
    "grouped_conv": Sample(dk.grouped_conv, lambda: {
        "x": torch.randn(2, 3, 16), "delta": torch.randn(2, 3, 2, 2, 4)[:, :, 1], "base": torch.randn(2, 16),
        "rounding": "engine", "out": blocks(2, 3, 16)}, ("out",)),
    "grouped_conv_add_rms_norm": Sample(dk.grouped_conv_add_rms_norm, lambda: {
        "x": torch.randn(2, 3, 16), "delta": torch.randn(2, 3, 2, 4), "base": torch.randn(2, 16),
        "residual": blocks(2, 3, 16), "weight": torch.randn(16), "eps": 1e-5, "rounding": "reference",
        "out": blocks(2, 3, 16), "residual_out": blocks(2, 3, 16)}, ("residual", "out", "residual_out")),
    "silu_and_mul": Sample(dk.silu_and_mul, lambda: {"x": torch.randn(3, 16), "out": boxed(3, 8)}, ("out",)),
    "qk_norm_rope": Sample(dk.qk_norm_rope, lambda: {
        "qkv": filled(3, 40), "positions": torch.tensor([0, 5, 6]), "cos_sin": torch.randn(12, 8), "num_heads": 3,
        "num_kv_heads": 1, "head_dim": 8, "q_weight": torch.randn(8), "k_weight": torch.randn(8), "eps": 1e-5,
        "interleaved": True, "cache": pages(), "slots": torch.tensor([3, -1, 9]), "rounding": "each"},
        ("qkv", "cache")),
    "write_context_kv": Sample(dk.write_context_kv, lambda: {
        "kv": torch.randn(4, 32), "positions": torch.tensor([0, 1, 5, 6]), "slots": torch.tensor([0, 1, 9, 15]),
        "caches": [pages(), pages()], "k_weights": torch.randn(2, 8), "cos_sin": torch.randn(12, 4), "eps": 1e-5,
        "interleaved": False, "commit_lens": int32(2, 1), "v_scale": 0.5, "rounding": "end"}, ("caches",)),
    "block_attention": Sample(dk.block_attention, lambda: {
        "q": torch.randn(2, 3, 2, 8), "k": torch.randn(2, 3, 1, 8), "v": torch.randn(2, 3, 1, 8), "cache": pages(),
        "page_table": tables(), "context_lens": int32(5, 2), "block_lens": int32(3, 2), "context_starts": int32(1, 0),
        "scale": 0.3, "causal": True, "window": (4, -1), "sinks": torch.randn(2), "softcap": 5.0,
        "out": boxed(2, 3, 2, 8)}, ("out",)),
    "qk_norm_rope_fp8": Sample(dk.qk_norm_rope, lambda: {
        "qkv": filled(3, 40), "positions": torch.tensor([0, 5, 6]), "cos_sin": torch.randn(12, 8), "num_heads": 3,
        "num_kv_heads": 1, "head_dim": 8, "cache": fp8_pages(), "slots": torch.tensor([3, -1, 9])}, ("qkv", "cache")),
    "write_context_kv_fp8": Sample(dk.write_context_kv, lambda: {
        "kv": torch.randn(4, 32), "positions": torch.tensor([0, 1, 5, 6]), "slots": torch.tensor([0, 1, 9, 15]),
        "caches": [fp8_pages(), fp8_pages()], "cos_sin": torch.randn(12, 4)}, ("caches",)),
    "block_attention_packed": Sample(dk.block_attention, lambda: {
        "q": torch.randn(5, 2, 8), "k": torch.randn(5, 1, 8), "v": torch.randn(5, 1, 8), "cache": pages(),
        "page_table": tables(), "context_lens": int32(5, 2), "block_lens": int32(3, 1), "block_starts": int32(0, 4),
        "max_block": 4, "causal": True, "out": boxed(5, 2, 8)}, ("out",)),
    "block_attention_fp8": Sample(dk.block_attention, lambda: {
        "q": torch.randn(2, 3, 2, 8), "k": torch.randn(2, 3, 1, 8), "v": torch.randn(2, 3, 1, 8),
        "cache": fp8_pages(), "page_table": tables(), "context_lens": int32(5, 2), "window": (4, 1),
        "out": boxed(2, 3, 2, 8)}, ("out",)),
    "linear": Sample(dk.linear, lambda: {
        "x": torch.randn(3, 16), "weight": torch.randn(20, 16), "bias": torch.randn(20),
        "out": boxed(3, 20)}, ("out",)),
    "linear_packed": Sample(dk.linear, lambda: {
        "x": torch.randn(3, 16), "weight": dk.pack_weight(torch.randn(20, 16)), "bias": torch.randn(20),
        "out": boxed(3, 20)}, ("out",)),
    "linear_int8": Sample(dk.linear, lambda: {
        "x": torch.randn(3, 16), "weight": int8_weight(20, 16), "bias": torch.randn(20), "out": boxed(3, 20)},
        ("out",)),
    "linear_blocks": Sample(dk.linear, lambda: {
        "x": torch.randn(3, 64), "weight": dk.pack_weight(q4_1_rows(20, 64), format="q4_1"), "bias": torch.randn(20),
        "out": boxed(3, 20)}, ("out",)),
    "pack_weight_blocks": Sample(dk.pack_weight, lambda: {
        "weight": q4_1_rows(20, 64), "format": "q4_1", "exact": True}, ()),
    "awq_blocks": Sample(dk.awq_blocks, lambda: int4_layer((128, 1)), ()),
    "gptq_blocks": Sample(dk.gptq_blocks, lambda: int4_layer((16, 8)) | {
        "g_idx": torch.zeros(128, dtype=torch.int32), "version": 2}, ()),
    "pack_weight": Sample(dk.pack_weight, lambda: {"weight": torch.randn(20, 16)}, ()),
    "pack_weight_int8": Sample(dk.pack_weight, lambda: {
        "weight": torch.randint(-127, 128, (20, 16), dtype=torch.int8), "scales": torch.rand(20)}, ()),
    "quantize_blocks": Sample(dk.quantize_blocks, lambda: {"weight": torch.randn(20, 64), "format": "q8_0"}, ()),
    "quantize_weight": Sample(dk.quantize_weight, lambda: {"weight": torch.randn(20, 16)}, ()),
    "route_experts": Sample(dk.route_experts, lambda: {
        "logits": filled(3, 12), "k": 3, "bias": torch.randn(12), "scoring": "sigmoid", "groups": 4, "top_groups": 2,
        "group_best": 2, "normalize": True, "scale": 2.5, "out_ids": torch.full((3, 3), 77, dtype=torch.int32),
        "out_weights": torch.full((3, 3), 77.0)}, ("out_ids", "out_weights")),
    "route_experts_softmax": Sample(dk.route_experts, lambda: {
        "logits": torch.randn(3, 12), "k": 3, "out_ids": torch.full((3, 3), 77, dtype=torch.int32),
        "out_weights": torch.full((3, 3), 77.0)}, ("out_ids", "out_weights")),
    "expert_mlp": Sample(dk.expert_mlp, lambda: routed(
        gate_up=torch.randn(4, 24, 16), down=torch.randn(4, 16, 12)), ("out",)),
    "expert_mlp_packed": Sample(dk.expert_mlp, lambda: routed(
        gate_up=experts(4, 24, 16), down=experts(4, 16, 12), gate_up_bias=torch.randn(4, 24),
        down_bias=torch.randn(4, 16), activation="clamped"), ("out",)),
    "expert_mlp_int8": Sample(dk.expert_mlp, lambda: routed(
        gate_up=experts(4, 24, 16, True), down=experts(4, 16, 12, True)), ("out",)),
    "pack_experts": Sample(dk.pack_experts, lambda: {"weights": torch.randn(4, 20, 16)}, ()),
    "pack_experts_int8": Sample(dk.pack_experts, lambda: {
        "weights": [torch.randint(-127, 128, (20, 16), dtype=torch.int8) for _ in range(4)],
        "scales": torch.rand(4, 20)}, ()),
    "lm_head_argmax": Sample(dk.lm_head_argmax, lambda: {
        "x": torch.randn(3, 16), "weight": dk.pack_weight(torch.randn(40, 16)), "bias": torch.randn(40),
        "num_valid": 30, "scale": 0.5, "softcap": 3.0, "id_offset": 100, "out_ids": boxed(3, dtype=torch.int64),
        "out_values": boxed(3)}, ("out_ids", "out_values")),
    "lm_head_argmax_lse": Sample(dk.lm_head_argmax, lambda: {
        "x": torch.randn(3, 16), "weight": dk.pack_weight(torch.randn(40, 16)), "out_ids": boxed(3, dtype=torch.int64),
        "out_values": boxed(3), "out_lse": boxed(3)}, ("out_ids", "out_values", "out_lse")),
    "lm_head_argmax_int8": Sample(dk.lm_head_argmax, lambda: {
        "x": torch.randn(3, 16), "weight": int8_weight(40, 16), "bias": torch.randn(40), "num_valid": 30, "scale": 0.5,
        "softcap": 3.0, "out_ids": boxed(3, dtype=torch.int64), "out_values": boxed(3)}, ("out_ids", "out_values")),
    "combine_argmax": Sample(dk.combine_argmax, lambda: {
        "values": torch.tensor([[1.0, 2.0, 3.0], [1.0, 4.0, 2.0]]), "ids": torch.tensor([[5, 1, 2], [3, 9, 8]]),
        "out_ids": boxed(3, dtype=torch.int64), "out_values": boxed(3)}, ("out_ids", "out_values")),
    "lm_head_topk": Sample(dk.lm_head_topk, lambda: {
        "x": torch.randn(3, 16), "weight": dk.pack_weight(torch.randn(40, 16)), "k": 5, "bias": torch.randn(40),
        "num_valid": 30, "scale": 0.5, "softcap": 3.0, "id_offset": 100, "out_ids": torch.full((3, 5), 77),
        "out_values": torch.full((3, 5), 77.0), "out_lse": boxed(3)}, ("out_ids", "out_values", "out_lse")),
    "lm_head_topk_int8": Sample(dk.lm_head_topk, lambda: {
        "x": torch.randn(3, 16), "weight": int8_weight(40, 16), "k": 5, "num_valid": 30,
        "out_ids": torch.full((3, 5), 77), "out_values": torch.full((3, 5), 77.0), "out_lse": boxed(3)},
        ("out_ids", "out_values", "out_lse")),
    "combine_topk": Sample(dk.combine_topk, lambda: {
        "values": torch.tensor([[[3.0, 1.0], [2.0, 2.0]], [[1.0, 0.5], [4.0, 2.0]]]),
        "ids": torch.tensor([[[5, 1], [2, 3]], [[30, 90], [80, 70]]]), "lse": torch.randn(2, 2),
        "out_ids": torch.full((2, 2), 77), "out_values": torch.full((2, 2), 77.0), "out_lse": boxed(2)},
        ("out_ids", "out_values", "out_lse")),
    "prepare_block": Sample(dk.prepare_block, lambda: {
        "anchor_ids": ids(2), "context_lens": int32(5, 2), "block_size": 3, "mask_token_id": 9, "page_table": tables(),
        "page_size": 4, "block_lens": int32(3, 2), "embedding": torch.randn(10, 6), "out": prepared(2, 3, 6)},
        ("out",)),
    "embed_tokens": Sample(dk.embed_tokens, lambda: {
        "ids": ids(2, 3), "table": torch.randn(10, 6), "out": boxed(2, 3, 6)}, ("out",)),
    "verify_greedy": Sample(dk.verify_greedy, lambda: {
        "draft_ids": torch.tensor(DRAFT), "target_ids": torch.tensor(TARGET), "context_lens": int32(5, 2),
        "logits": None, "block_lens": int32(3, 2), "out": verified(2, 3)}, ("out",)),
    "verify_greedy_logits": Sample(dk.verify_greedy, lambda: {
        "draft_ids": torch.tensor(DRAFT), "target_ids": None, "context_lens": int32(5, 2),
        "logits": torch.randn(2, 3, 10), "block_lens": int32(3, 2), "out": verified(2, 3)}, ("out",)),
    "verify_sample": Sample(dk.verify_sample, lambda: {
        "draft_ids": torch.tensor(DRAFT), "logits": torch.randn(2, 3, 10), "context_lens": int32(5, 2),
        "params": sampling(2), "proposal": None, "adjustments": LogitAdjustments(
            seen=int32(*range(6)).view(2, 3, 1), repetition_penalty=torch.tensor([1.5, 1.0]),
            bias=torch.randn(2, 1, 10).expand(2, 3, 10), bitmask=torch.full((2, 3, 1), 0x3FE, dtype=torch.int32)),
        "block_lens": int32(3, 2), "out": verified(2, 3), "workspace": torch.zeros(200)}, ("out", "workspace")),
    "verify_sample_sparse": Sample(dk.verify_sample, lambda: {
        "draft_ids": torch.tensor(DRAFT), "logits": torch.randn(2, 3, 10), "context_lens": int32(5, 2),
        "params": sampling(2), "proposal": Proposal(
            probs=torch.tensor([0.75, 0.25]).expand(2, 2, 2), ids=torch.tensor([[2, 5], [3, -1]]).expand(2, 2, 2)),
        "rule": "block", "block_lens": int32(3, 0), "out": verified(2, 3), "workspace": torch.zeros(200)},
        ("out", "workspace")),
    "verify_sample_dense": Sample(dk.verify_sample, lambda: {
        "draft_ids": torch.tensor(DRAFT), "logits": torch.randn(2, 3, 10), "context_lens": int32(5, 2),
        "params": sampling(2), "proposal": Proposal(probs=torch.softmax(torch.randn(2, 2, 10), -1)),
        "block_lens": int32(3, 2), "out": verified(2, 3), "workspace": torch.zeros(200)}, ("out", "workspace")),
    "verify_sample_logits": Sample(dk.verify_sample, lambda: {
        "draft_ids": torch.tensor(DRAFT), "logits": torch.randn(2, 3, 10), "context_lens": int32(5, 2),
        "params": sampling(2), "proposal": Proposal(logits=torch.randn(2, 2, 10)), "rule": "block",
        "block_lens": int32(3, 2), "out": verified(2, 3), "workspace": torch.zeros(200)}, ("out", "workspace")),
    "sample_draft": Sample(dk.sample_draft, lambda: {
        "values": torch.tensor([[3.0, 1.0, 0.5], [2.0, 2.0, -1.0]]).expand(2, 2, 3).contiguous(),
        "ids": ids(2, 2, 3), "context_lens": int32(5, 2), "params": sampling(2),
        "out_ids": boxed(2, 2, dtype=torch.int64), "out_probs": torch.zeros(2, 2, 3)}, ("out_ids", "out_probs")),
    "select_candidates": Sample(dk.select_candidates, lambda: {
        **candidates(), "params": sampling(2), "out_ids": boxed(2, 2, dtype=torch.int64),
        "out_logprobs": torch.zeros(2, 2), "out_probs": torch.zeros(2, 2, 3)},
        ("out_ids", "out_logprobs", "out_probs")),
    "select_candidates_markov": Sample(dk.select_candidates, lambda: {
        **candidates(), "hidden": None, "out_ids": boxed(2, 2, dtype=torch.int64),
        "out_logprobs": torch.zeros(2, 2)}, ("out_ids", "out_logprobs")),
    "select_candidates_greedy": Sample(dk.select_candidates, lambda: {
        **candidates(), "out_ids": boxed(2, 2, dtype=torch.int64), "out_logprobs": torch.zeros(2, 2)},
        ("out_ids", "out_logprobs")),
}


def tensors_in(value) -> list[torch.Tensor]:
    """The tensors of one argument or result, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    if isinstance(value, RECORDS):
        return [t for v in vars(value).values() for t in tensors_in(v)]
    return []


class RawCalls(TorchDispatchMode):
    """Notes the calls into the dflash namespace that a public function makes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dflash":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class OnReference(TorchDispatchMode):
    """Answers every dflash op with its reference."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dflash":
            return _library.REFERENCES[func._schema.name.split("::")[1]](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
