"""Weights in blocks of 4 to 8 bits, as GGUF files store them: their values, products by integer dot products, rows."""

import copy

import pytest
import torch
import torch.nn.functional as F

import dflash_kernels as dk
from bench.random_blocks import blocks
from dflash_kernels import reference
from dflash_kernels.formats import FORMATS
from dflash_kernels.testing import every_isa, same_bits, use_isa

FORMAT = pytest.mark.parametrize("name", FORMATS)


def problem(name, dtype, rows, n, k):
    return torch.randn(rows, k).to(dtype), blocks(name, n, k), torch.randn(n).to(dtype)


def close(got, want, dtype):
    """The same integers, and additions in the same order: what is left are fused multiply-adds in place of two
    roundings, and one rounding to dtype."""
    if want.numel() == 0:
        return True
    error = (got.float() - want.float()).abs() / want.abs().amax()
    return bool((error <= {torch.float32: 2e-6, torch.float16: 2 ** -11, torch.bfloat16: 2 ** -8}[dtype]).all())


@FORMAT
def test_values_are_the_file_s(name):
    gguf = pytest.importorskip("gguf")
    rows = blocks(name, 45, 512)
    want = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    packed = dk.pack_weight(rows, format=name)
    assert same_bits(packed.rows(torch.arange(45)) + 0.0, want + 0.0) and packed.shape == (45, 512)
    assert torch.equal(reference.quant.widen(packed.data, name, 45, 512), want)
    assert packed.data.nbytes <= 1.031 * 48 / 45 * rows.nbytes


@FORMAT
def test_linear_matches_the_reference(byte_isa, dtype, name):
    for shape in ((1, 16, 256), (8, 130, 256), (19, 33, 768), (70, 32, 512), (0, 16, 256)):
        x, w, b = problem(name, dtype, *shape)
        x[:, :32] *= 100  # pieces of a row have scales of their own
        packed = dk.pack_weight(w, format=name)
        want = torch.empty(shape[:2], dtype=torch.float32)
        reference.linear.linear(x, packed.data, None, FORMATS[name].number, b, shape[1], want)
        got = dk.linear(x, packed, b)
        assert got.shape == want.shape and (close(got, want, dtype) or not shape[0]), shape


@FORMAT
def test_integers_are_exact(byte_isa, name):
    """With scales of 1 and sums below 2^24 there is nothing to round: an integer that is off by one shows."""
    n, k, f = 48, 512, FORMATS[name]
    w = torch.randint(0, 256, (n, k // f.block, f.bytes), dtype=torch.uint8)
    one = torch.ones(1).half().view(torch.uint8)
    w[..., 208:210] = one if name == "q6_k" else w[..., 208:210]
    if name == "q6_k":
        w[..., 192:208] = 1
    else:
        w[..., :2] = one
    if name == "iq4_xs":
        w[..., 2:4], w[..., 4:8] = 0xaa, 0x11  # 32 above the scale
    elif f.block == 256 and name != "q6_k":
        w[..., 4:16] = 0
        w[..., 4:8] = w[..., 12:16] = 1
    if name in ("q4_k", "q5_k", "q4_1", "q5_1"):
        w[..., 2:4] = one
    packed = dk.pack_weight(w.view(n, -1), format=name)
    x = torch.randint(-127, 128, (9, k)).float()
    x[:, ::32] = 127  # of every piece, so that its scale is 1
    want = (x.double() @ packed.rows(torch.arange(n)).double().T).float()
    assert want.abs().max() < 2 ** 24 and torch.equal(dk.linear(x, packed), want)
    extreme = torch.full((2, k), 127.0)
    extreme[1] = -127
    assert torch.equal(dk.linear(extreme, packed), (extreme.double() @ packed.rows(torch.arange(n)).double().T).float())


@FORMAT
def test_a_row_has_the_same_bits_in_every_number_of_rows(byte_isa, name):
    x, w, b = problem(name, torch.bfloat16, 70, 112, 768)
    packed = dk.pack_weight(w, format=name)
    whole, (ids, top, lse) = dk.linear(x, packed, b), dk.lm_head_topk(x, packed, 1)
    for rows in (*range(1, 18), 31, 33, 64, 65):
        at = slice(70 - rows, 70)
        assert same_bits(dk.linear(x[at], packed, b), whole[at]), rows
        best, values = dk.lm_head_argmax(x[at], packed)
        assert torch.equal(best, ids[at, 0]) and same_bits(values, top[at, 0]), rows
        assert same_bits(dk.lm_head_topk(x[at], packed, 1)[2], lse[at]), rows


@FORMAT
def test_instruction_sets_with_fused_multiply_adds_have_the_same_bits(dtype, name):
    """Pieces of a row that do not fill a group of four, and more rows than one group has."""
    k = {32: 160, 256: 1280}[FORMATS[name].block]
    for rows in (1, 5, 13, 29):
        x, w, b = problem(name, dtype, rows, 80, k)
        x[:, 32:64] *= 1000
        packed, found = dk.pack_weight(w, format=name), {}
        for isa in every_isa():
            if isa not in ("generic", "reference"):
                with use_isa(isa):
                    found[isa] = dk.linear(x, packed, b)
        want = torch.empty(rows, 80)
        reference.linear.linear(x, packed.data, None, FORMATS[name].number, b, 80, want)
        for isa, got in found.items():
            assert close(got, want, dtype) and same_bits(got, next(iter(found.values()))), (isa, rows)


@pytest.mark.parametrize("name", ["q4_1", "q8_0", "q4_k", "q6_k"])
@pytest.mark.parametrize("rows, n", [(8, 130), (19, 33)])
def test_groups_of_rows_take_turns_over_a_long_k(byte_isa, name, rows, n):
    x, w, _ = problem(name, torch.float32, rows, n, 2304)
    packed = dk.pack_weight(w, format=name)
    whole, want = dk.linear(x, packed), torch.empty(rows, n)
    reference.linear.linear(x, packed.data, None, FORMATS[name].number, None, n, want)
    assert close(whole, want, torch.float32)
    for i in (0, rows // 2, rows - 1):
        assert same_bits(dk.linear(x[i:i + 1], packed), whole[i:i + 1]), i


def test_bits_do_not_depend_on_threads(byte_isa, by_threads):
    x, w, _ = problem("q4_1", torch.bfloat16, 5, 600, 512)
    packed = dk.pack_weight(w, format="q4_1")
    got = by_threads(lambda: dk.linear(x, packed))
    assert same_bits(got[0], got[1]) and same_bits(got[0], got[2])


@FORMAT
def test_exact_weights_have_the_bits_of_their_elements(isa, dtype, name):
    x, w, b = problem(name, dtype, 20, 50, 512)
    exact = dk.pack_weight(w, format=name, exact=True)
    elements = dk.pack_weight(exact.rows(torch.arange(50)).to(dtype))
    for rows in (1, 8, 20):
        assert same_bits(dk.linear(x[:rows], exact, b), dk.linear(x[:rows], elements, b)), rows
        assert torch.equal(dk.lm_head_argmax(x[:rows], exact)[0], dk.lm_head_argmax(x[:rows], elements)[0])


@FORMAT
def test_rows_are_looked_up(isa, dtype, name):
    packed = dk.pack_weight(blocks(name, 40, 256), format=name)
    elements, ids = packed.rows(torch.arange(40)), torch.tensor([[39, 0, 17], [-1, 2**40, 16]])
    out = torch.full((2, 3, 300), 7.0, dtype=dtype)
    dk.embed_tokens(ids, packed, out=out[..., 10:266])
    assert torch.equal(out[..., 10:266], dk.embed_tokens(ids, elements.to(dtype)))
    assert (out[..., :10] == 7).all() and (out[..., 266:] == 7).all()
    lens = torch.tensor([5, 9], dtype=torch.int32)
    block = dk.prepare_block(torch.tensor([3, 39]), lens, 4, 20, embedding=packed)
    assert torch.equal(block.rows, dk.prepare_block(torch.tensor([3, 39]), lens, 4, 20,
                                                    embedding=elements.bfloat16()).rows)


@FORMAT
def test_rounding_costs_half_a_step_of_each_element(byte_isa, name):
    """Against products of unrounded rows: a step is at most 1 / 63.5 of a piece's largest magnitude."""
    x, w, _ = problem(name, torch.float32, 6, 64, 512)
    x[2, 64], x[3, 96] = 127.9, -255.9  # a step less, and they would be 128, which int8 does not have
    elements = dk.pack_weight(w, format=name).rows(torch.arange(64))
    bound = (x.view(6, -1, 32).abs().amax(-1, keepdim=True) / 127).expand(-1, -1, 32).reshape(6, -1) @ elements.abs().T
    got = dk.linear(x, dk.pack_weight(w, format=name))
    assert ((got - F.linear(x, elements)).abs() <= bound + 1e-4).all()


@FORMAT
def test_rows_of_any_size(byte_isa, name):
    """Zeros, subnormal and huge rows; one that is not finite, or beyond 2^106, is NaN and stays alone."""
    x, w, _ = problem(name, torch.float32, 8, 32, 256)
    packed = dk.pack_weight(w, format=name)
    clean = dk.linear(x, packed)
    x[1], x[3, 5], x[4, 9], x[6, 200] = 0, float("nan"), float("inf"), 2.0 ** 108
    got = dk.linear(x, packed)
    assert got[[3, 4, 6]].isnan().all() and (got[1] == 0).all() and same_bits(got[[0, 2, 5, 7]], clean[[0, 2, 5, 7]])
    for power in (-40, 60):
        assert same_bits(dk.linear(x[:1] * 2.0 ** power, packed), clean[:1] * 2.0 ** power)
    assert (dk.linear(torch.full((1, 256), 1e-44), packed).abs() < 1e-25).all()


def test_strided_rows_and_untouched_neighbours(byte_isa, dtype):
    x, w, b = problem("q4_0", dtype, 6, 40, 64)
    wide_x = torch.full((6, 200), float("nan")).to(dtype)
    wide_x[:, 70:134] = x
    out = torch.full((6, 100), 7.0).to(dtype)
    packed = dk.pack_weight(w, format="q4_0")
    dk.linear(wide_x[:, 70:134], packed, b, out=out[:, 30:70])
    assert same_bits(out[:, 30:70].contiguous(), dk.linear(x, packed, b))
    assert (out[:, :30] == 7).all() and (out[:, 70:] == 7).all()


def test_copies_and_strides_of_a_weight():
    w = blocks("q8_0", 40, 64)
    packed, turned = dk.pack_weight(w, format="q8_0", exact=True), dk.pack_weight(w.T.contiguous().T, format="q8_0")
    found = copy.deepcopy(packed)
    assert (found.format, found.exact) == ("q8_0", True) and torch.equal(found.data, packed.data)
    assert torch.equal(turned.data, packed.data)
    assert found.data.untyped_storage().nbytes() == found.data.nbytes


def test_bad_input_names_what_was_expected_and_got():
    w = blocks("q4_1", 4, 64)
    with pytest.raises(ValueError, match="pack_weight: format must be one of q4_0, .*; got 'q3_k'"):
        dk.pack_weight(w, format="q3_k")
    with pytest.raises(ValueError, match=r"rows of whole blocks of 20 bytes, as q4_1 has; got uint8 \(4, 39\)"):
        dk.pack_weight(w[:, :39], format="q4_1")
    with pytest.raises(TypeError, match=r"pack_weight: weight must be uint8 .*; got float32 \(4, 40\)"):
        dk.pack_weight(w.float(), format="q4_1")
    with pytest.raises(ValueError, match="pack_weight: scales must be None for blocks"):
        dk.pack_weight(w, torch.ones(4), format="q4_1")
    with pytest.raises(ValueError, match="pack_weight: exact must be False for a weight without a format; got True"):
        dk.pack_weight(torch.randn(4, 4), exact=True)
    packed = dk.pack_weight(w, format="q4_1")
    with pytest.raises(ValueError, match=r"PackedWeight: data must be contiguous \(1, 640\), as pack_weight lays it"):
        dk.PackedWeight(packed.data[:, :-1], 4, 64, format="q4_1")
    with pytest.raises(ValueError, match="in_features must be a multiple of 256, the block of q4_k; got 64"):
        dk.PackedWeight(packed.data, 4, 64, format="q4_k")
    with pytest.raises(TypeError, match="PackedWeight: data must be a tensor of uint8, as there is a format"):
        dk.PackedWeight(packed.data.float(), 4, 64, format="q4_1")
    with pytest.raises(ValueError, match=r"linear: x must have 64 = weight's K columns; got float32 \(2, 32\)"):
        dk.linear(torch.randn(2, 32), packed)
    with pytest.raises(TypeError, match="embed_tokens: table must be a tensor or a PackedWeight in blocks; got one of"):
        dk.embed_tokens(torch.tensor([0]), dk.pack_weight(torch.randn(4, 4)))
    with pytest.raises(ValueError, match="prepare_block: mask_token_id must be a row of embedding, below 4; got 4"):
        dk.prepare_block(torch.tensor([0]), torch.tensor([0], dtype=torch.int32), 2, 4, embedding=packed)


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_blocks_are_quantised_as_llama_cpp_does(dtype, name):
    gguf = pytest.importorskip("gguf")
    w = (torch.randn(40, 96) * torch.logspace(-3, 2, 40)[:, None]).to(dtype)
    w[7] = 0
    rows = dk.quantize_blocks(w, name)
    want = gguf.quants.dequantize(gguf.quants.quantize(w.float().numpy(), gguf.GGMLQuantizationType[name.upper()]),
                                  gguf.GGMLQuantizationType[name.upper()])
    got = dk.pack_weight(rows, format=name).rows(torch.arange(40))
    # Ties apart, which 1 / d and / d decide each in its way.
    steps = 127 if name == "q8_0" else 7
    step = torch.from_numpy(abs(want)).view(40, -1, 32).amax(-1).repeat_interleave(32, 1) / steps
    assert ((got - torch.from_numpy(want)).abs() <= 1.01 * step).all()
    assert ((got == torch.from_numpy(want)).float().mean() > 0.99) and (got[7] == 0).all()
    with pytest.raises(ValueError, match=r"quantize_blocks: weight must have K, a multiple of 32, columns; got"):
        dk.quantize_blocks(w[:, :40], name)
    with pytest.raises(ValueError, match="quantize_blocks: format must be q8_0 or q4_0; got 'q4_1'"):
        dk.quantize_blocks(w, "q4_1")
    for wrong in (float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="quantize_blocks: weight must be finite, and at most [58]"):
            dk.quantize_blocks(torch.full((2, 32), wrong), name)
