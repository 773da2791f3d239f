import math

import pytest

import dflash_kernels as dk
from bench import cost
from tests.support.costs import cost_of

# Sizes by their letters in docs/ops.md: no two formulas that differ agree on them.
B, Q, T, V, H, I, HQ, HKV, D, L, S, N, K, R, C = 3, 5, 7, 1009, 64, 48, 8, 2, 16, 6, 4, 40, 2500, 12, 300  # noqa: E741
E, CACHED, WEIGHT = 4, 1, 2
GROUPS, TAPS = 32, 3
EXPERTS, READ = 10, 6
SIZES = {"B": B, "Q": Q, "T": T, "V": V, "H": H, "I": I, "Hq": HQ, "Hkv": HKV, "D": D, "L": L, "S": S, "N": N, "K": K,
         "k": 9, "E": EXPERTS, "X": READ, "G": GROUPS, "t": TAPS, "R": R, "C": C, "e": E, "c": CACHED,
         "w": WEIGHT, "ceil": math.ceil}
PASSED = [cost.linear_bytes(T, N, K, E, WEIGHT, chunks) for chunks in (0, math.ceil(K / 1024))]
TURNED = [cost.rope_bytes(T, HQ, HKV, D, R, E, cached=cached, cache_itemsize=CACHED) for cached in (False, True)]
MOVED = {
    "rms_norm": [cost.norm_bytes(T, H, E, add=False)],
    "add_rms_norm": [cost.norm_bytes(T, H, E, add=True)],
    "grouped_conv": [cost.conv_bytes(T, H, GROUPS, TAPS, E)],
    "grouped_conv_add_rms_norm": [cost.conv_bytes(T, H, GROUPS, TAPS, E, add_norm=True)],
    "silu_and_mul": [cost.activation_bytes(T, I, E)],
    "qk_norm_rope": [TURNED[0], TURNED[1] - TURNED[0]],
    "write_context_kv": [cost.context_bytes(T, L, HKV, D, R, E, cache_itemsize=CACHED)],
    "prepare_block": [cost.block_bytes(B, Q, hidden=H, itemsize=E)],
    "embed_tokens": [cost.embed_bytes(T, H, E)],
    "block_attention": [sum(cost.attention_bytes(C // B, Q, HQ, HKV, D, E, CACHED) for _ in range(B))],
    "linear": [PASSED[0], PASSED[1] - PASSED[0]],
    "route_experts": [cost.route_bytes(T, EXPERTS, 9, E)],
    "expert_mlp": [cost.experts_bytes(READ, T, H, I, 9, E, WEIGHT)],
    "lm_head_argmax": [cost.lm_head_bytes(T, V, H, E, WEIGHT)],
    "lm_head_topk": [cost.lm_head_bytes(T, V, H, E, WEIGHT, k=9, lse=True)],
    "combine_argmax": [cost.combine_bytes(S, R)],
    "combine_topk": [cost.combine_bytes(S, R, k=9, lse=True)],
    "verify_greedy": [cost.verify_bytes(B, Q), cost.verify_bytes(B, Q, vocab=V, itemsize=E)],
    "verify_sample": [cost.sample_bytes(B, Q, V, E)],
    "sample_draft": [cost.draft_bytes(B, Q - 1, K)],
    "select_candidates": [cost.select_bytes(B, Q - 1, K, R, E)],
}


@pytest.mark.parametrize("op", dk.build_info()["ops"])
def test_an_op_s_docstring_has_the_bytes_that_benchmarks_count(op):
    assert [eval(formula, {}, SIZES) for formula in cost_of(op).formulas] == MOVED[op]


def test_silu_and_mul():
    assert cost.activation_bytes(8, 1536, 2) == 2 * 8 * 3 * 1536 and cost.activation_flops(8, 1536) == 5 * 8 * 1536


def test_qk_norm_rope():
    alone, stored = cost.rope_bytes(1, 9, 3, 64, 64, 2), cost.rope_bytes(1, 9, 3, 64, 64, 2, cached=True)
    assert cost.rope_bytes(8, 9, 3, 64, 64, 2) == 8 * alone == 8 * (2 * 12 * 64 * 2 + 64 * 4 + 8)
    assert stored - alone == 3 * 3 * 64 * 2 + 8
    assert cost.rope_bytes(1, 9, 3, 64, 64, 2, cached=True, cache_itemsize=1) == stored - 2 * 3 * 64
    assert cost.rope_flops(1, 9, 3, 64, 32) == 12 * (4 * 64 + 3 * 32)


def test_write_context_kv():
    wide = cost.context_bytes(8, 3, 3, 64, 64, 2)
    assert wide == 8 * (4 * 3 * 3 * 64 * 2 + 64 * 4 + 16) + 3 * 64 * 2
    assert wide - cost.context_bytes(8, 3, 3, 64, 64, 2, cache_itemsize=1) == 8 * 2 * 9 * 64
    assert cost.context_flops(1, 3, 3, 64, 64) == 9 * 7 * 64


def test_what_the_others_read_once_is_most_of_what_they_move():
    """In bfloat16: the weight, the context's keys and values, the target's logits, the rows."""
    for moved, read in ((cost.linear_bytes(1, 4096, 4096, 2), 2 * 4096 * 4096),
                        (cost.lm_head_bytes(1, 49152, 576, 2), 2 * 49152 * 576),
                        (cost.attention_bytes(4096, 8, 32, 8, 128, 2), 2 * 2 * 4096 * 8 * 128),
                        (cost.verify_bytes(1, 8, vocab=49152, itemsize=2), 2 * 8 * 49152),
                        (cost.sample_bytes(1, 8, 49152, 2), 2 * 8 * 49152),
                        (cost.experts_bytes(57, 8, 3072, 1536, 8, 2), 2 * 57 * 3 * 3072 * 1536),
                        (cost.norm_bytes(64, 4096, 2, add=False), 2 * 2 * 64 * 4096)):
        assert read < moved < 1.05 * read


def test_8_bits_of_a_weight_or_of_a_cache_are_half_of_what_is_read():
    assert cost.linear_bytes(1, 64, 32, 2) - cost.linear_bytes(1, 64, 32, 2, 1) == 64 * 32
    assert cost.attention_bytes(100, 1, 4, 2, 8, 2) - cost.attention_bytes(100, 1, 4, 2, 8, 2, 1) == 2 * 100 * 2 * 8
