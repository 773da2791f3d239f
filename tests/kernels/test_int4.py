"""Tensors of AWQ and GPTQ checkpoints, packed here by their definitions, as rows of blocks."""

import pytest
import torch

import dflash_kernels as dk
from dflash_kernels import reference

N, K = 24, 384
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each nibble of a word has


def layer(zeros=None):
    codes, d = torch.randint(0, 16, (K, N)), (torch.rand(K // 128, N) * 0.02).half()
    zeros = torch.randint(0, 16, (K // 128, N)) if zeros is None else torch.full((K // 128, N), zeros)
    return codes, zeros, d, (codes - zeros.repeat_interleave(128, 0)).T * d.repeat_interleave(128, 0).T.float()


def by_columns(values, order=range(8)):
    """(R, N) -> (R, N / 8) int32."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(order):
        words |= values[:, column::8] << 4 * nibble
    return words.to(torch.int32)


def by_rows(values):
    return by_columns(values.T).T.contiguous()


def elements(rows, format):
    return reference.quant.widen(reference.quant_gpu.pack(rows, format), format, N, K)


def test_awq_s_elements():
    codes, zeros, d, want = layer()
    rows, format = dk.awq_blocks(by_columns(codes, AWQ_ORDER), by_columns(zeros, AWQ_ORDER), d)
    assert format == "uint4_g128" and torch.equal(elements(rows, format), want)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_s_elements(version):
    codes, zeros, d, want = layer()
    zeros = zeros.clamp(min=1)
    want = (codes - zeros.repeat_interleave(128, 0)).T * d.repeat_interleave(128, 0).T.float()
    stored = zeros - (2 - version)
    given = by_rows(codes), by_columns(stored), d, torch.arange(K, dtype=torch.int32) // 128
    rows, format = dk.gptq_blocks(*given, version=version)
    assert format == "uint4_g128" and torch.equal(elements(rows, format), want)


def test_symmetric_gptq_keeps_no_zero_points_and_a_zero_point_of_16_is_one():
    codes, _, d, want = layer(zeros=8)
    rows, format = dk.gptq_blocks(by_rows(codes), torch.full((3, 3), 0x77777777, dtype=torch.int32), d)
    assert rows.shape == (N, 3 * 66) and torch.equal(elements(rows, format), want)
    codes, _, d, want = layer(zeros=16)
    rows, format = dk.gptq_blocks(by_rows(codes), torch.full((3, 3), -1, dtype=torch.int32), d)
    assert format == "uint4_g128" and torch.equal(elements(rows, format), want)


def test_bad_input_names_what_was_expected_and_got():
    codes, zeros, d, _ = layer()
    qweight, qzeros = by_rows(codes), by_columns(zeros)
    with pytest.raises(TypeError, match=r"gptq_blocks: qweight must be int32 \(K / 8, N\); got int64"):
        dk.gptq_blocks(qweight.long(), qzeros, d)
    with pytest.raises(ValueError, match=r"K, a multiple of 128, and N, a multiple of 8; got K = 376, N = 24"):
        dk.gptq_blocks(qweight[:-1], qzeros, d)
    with pytest.raises(ValueError, match=r"scales must have shape \(K / 128, N\) = \(3, 24\); got float16 \(6, 24\)"):
        dk.gptq_blocks(qweight, qzeros, d.repeat(2, 1))
    with pytest.raises(ValueError, match=r"scales must be finite numbers of float16; got inf in float16"):
        dk.gptq_blocks(qweight, qzeros, torch.full_like(d, float("inf")))
    with pytest.raises(ValueError, match=r"scales must be finite numbers of float16; got 1.04858e\+06 in bfloat16"):
        dk.awq_blocks(by_columns(codes), qzeros, torch.full_like(d, 2.0**20, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="gptq_blocks: version must be 1 or 2; got 3"):
        dk.gptq_blocks(qweight, qzeros, d, version=3)
    groups = torch.arange(K, dtype=torch.int32) // 128
    groups[5] = 2
    with pytest.raises(NotImplementedError, match="g_idx must be k // 128, as it is without desc_act; got 2 for k"):
        dk.gptq_blocks(qweight, qzeros, d, groups)
    with pytest.raises(ValueError, match=r"g_idx must have shape \(K,\) = \(384\); got int32 \(383,\)"):
        dk.gptq_blocks(qweight, qzeros, d, groups[1:])


def test_groups_of_128_have_kernels_on_a_gpu_alone():
    codes, zeros, d, _ = layer()
    rows, format = dk.awq_blocks(by_columns(codes), by_columns(zeros), d)
    with pytest.raises(NotImplementedError) as refused:
        dk.pack_weight(rows, format=format)
    assert str(refused.value) == "pack_weight: weights in uint4_g128 have kernels on CUDA alone; got cpu"
    for op in ("linear", "lm_head_argmax", "lm_head_topk", "embed_tokens", "prepare_block"):
        assert dk.supports(op, device="cpu", weight_format=format).reason == str(refused.value)
        assert dk.supports(op, device="cuda", weight_format=format) and dk.supports(op, weight_format=format)
        assert dk.supports(op, device="cpu", weight_format="q4_k")
    assert dk.supports("linear", weight_format="q3_k").reason.startswith("pack_weight: format must be one of q4_0, ")
    with pytest.raises(TypeError, match="supports: weight_format must be a str; got 4"):
        dk.supports("linear", weight_format=4)
    with pytest.raises(TypeError, match="supports: facts of rms_norm must be among device, dtype; got weight_format"):
        dk.supports("rms_norm", weight_format="q4_0")
