from bench import cost


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
                        (cost.norm_bytes(64, 4096, 2, add=False), 2 * 2 * 64 * 4096)):
        assert read < moved < 1.05 * read


def test_8_bits_of_a_weight_or_of_a_cache_are_half_of_what_is_read():
    assert cost.linear_bytes(1, 64, 32, 2) - cost.linear_bytes(1, 64, 32, 2, 1) == 64 * 32
    assert cost.attention_bytes(100, 1, 4, 2, 8, 2) - cost.attention_bytes(100, 1, 4, 2, 8, 2, 1) == 2 * 100 * 2 * 8
