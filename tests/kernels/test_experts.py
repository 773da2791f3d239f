"""expert_mlp: the weighted sum of each row's experts, in the order of its slots, with a row's bits its own."""

import pytest
import torch

import dflash_kernels as dk
from dflash_kernels import reference
from dflash_kernels.ops.experts import ACTIVATIONS
from dflash_kernels.testing import assert_within_budget, doubles, same_bits
from tests.support.op_samples import int32

# rows, H, I, experts, slots: one row; sizes that fill no block; experts of more rows than a panel; rows of more pairs
# than are taken at once
SHAPES = [(1, 32, 16, 4, 2), (5, 40, 24, 6, 3), (3, 17, 33, 5, 5), (150, 64, 48, 4, 2), (0, 32, 16, 4, 2)]
MANY = (530, 16, 16, 8, 4)


def problem(dtype, rows, hidden, inner, experts, slots, biased=True):
    """x, gate_up, down, ids, weights, and biases by name."""
    ids = torch.rand(rows, experts).argsort(-1)[:, :slots].int().contiguous()
    x, weights = torch.randn(rows, hidden).to(dtype), torch.rand(rows, slots)
    gate_up = (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, inner) / inner**0.5).to(dtype)
    biases = {"gate_up_bias": torch.randn(experts, 2 * inner).to(dtype),
              "down_bias": torch.randn(experts, hidden).to(dtype)} if biased else {}
    return x, gate_up, down, ids, weights, biases


def from_reference(x, gate_up, down, ids, weights, gate_up_bias=None, down_bias=None, activation="silu",
                   first_expert=0, scales=(None, None), dtype=torch.float64):
    out = torch.empty(x.shape, dtype=dtype)
    as_ours = doubles if dtype == torch.float64 else lambda *tensors: tensors
    reference.experts.expert_mlp(*as_ours(x, gate_up, down), *scales, ids, *as_ours(weights, gate_up_bias, down_bias),
                                 down.shape[2], ACTIVATIONS[activation], first_expert, out)
    return out


def torch_like(x, gate_up, down, ids, weights, gate_up_bias=None, down_bias=None, activation="silu"):
    """The same, a row and an expert at a time, in torch's own products and x's dtype."""
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for slot, e in enumerate(ids[row].tolist()):
            sums = x[row] @ gate_up[e].T + (0 if gate_up_bias is None else gate_up_bias[e])
            gate, up = sums.chunk(2)
            if activation == "clamped":
                gate, up = gate.clamp(max=7), up.clamp(-7, 7)
                h = (up + 1) * gate * torch.sigmoid(gate * 1.702)
            else:
                h = torch.nn.functional.silu(gate) * up
            y = h @ down[e].T + (0 if down_bias is None else down_bias[e])
            out[row] += (weights[row, slot] * y).to(x.dtype)
    return out


def quantized(weights):
    pairs = [dk.quantize_weight(w) for w in weights]
    return torch.stack([q for q, _ in pairs]), torch.stack([scales for _, scales in pairs])


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(isa, dtype, shape):
    x, gate_up, down, ids, weights, biases = problem(dtype, *shape)
    packed = dk.pack_experts(gate_up), dk.pack_experts(down)
    for given in (biases | {"activation": "clamped"}, {}):
        like = torch_like(x, gate_up, down, ids, weights, **given)
        got = dk.expert_mlp(x, *packed, ids, weights, **given)
        want = from_reference(x, gate_up, down, ids, weights, **given)
        assert_within_budget(got, want, like, factor=4)
        assert same_bits(dk.expert_mlp(x, gate_up, down, ids, weights, **given), got), "packed and plain weights"


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_weights_in_8_bits(isa, dtype, shape):
    x, gate_up, down, ids, weights, biases = problem(dtype, *shape)
    (q, scales), (p, others) = quantized(gate_up), quantized(down)
    wide = (q * scales[:, :, None]).to(dtype), (p * others[:, :, None]).to(dtype)
    for given in (biases, {}):
        got = dk.expert_mlp(x, dk.pack_experts(q, scales), dk.pack_experts([*p], others), ids, weights, **given)
        want = from_reference(x, q, p, ids, weights, scales=doubles(scales, others), **given)
        assert_within_budget(got, want, torch_like(x, *wide, ids, weights, **given), factor=4)


def test_the_gate_s_rows_come_first_and_clamped_is_gpt_oss_s(isa):
    """Beside transformers' experts, whose rows of gate and up alternate."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=5)
    theirs = GptOssExperts(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    x, _, _, ids, weights, _ = problem(torch.float32, 9, 32, 48, 5, 3)
    with torch.no_grad():
        want = theirs(x, ids.long(), weights)
    w, bias = theirs.gate_up_proj.detach().transpose(1, 2), theirs.gate_up_proj_bias.detach()
    got = dk.expert_mlp(x, dk.pack_experts(torch.cat((w[:, ::2], w[:, 1::2]), 1)),
                        dk.pack_experts(theirs.down_proj.detach().transpose(1, 2)), ids, weights,
                        gate_up_bias=torch.cat((bias[:, ::2], bias[:, 1::2]), 1),
                        down_bias=theirs.down_proj_bias.detach(), activation="clamped")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "minimax-m2"])
def test_published_layers_give_the_same(isa, family):
    transformers = pytest.importorskip("transformers")
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Layer
        config = transformers.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=6,
                                            num_experts_per_tok=2)
    elif family == "qwen3":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Layer
        config = transformers.Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=48, num_experts=6,
                                             num_experts_per_tok=2, norm_topk_prob=True)
    else:
        from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2SparseMoeBlock as Layer
        config = transformers.MiniMaxM2Config(hidden_size=32, intermediate_size=48, num_local_experts=6,
                                              num_experts_per_tok=2)
    layer, x, given = Layer(config), torch.randn(9, 32), {}
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if family == "minimax-m2":
        layer.e_score_correction_bias.normal_()
        given = {"scoring": "sigmoid", "bias": layer.e_score_correction_bias}
    with torch.no_grad():
        want = layer(x[None])
    want = want[0] if isinstance(want, tuple) else want
    ids, weights = dk.route_experts(dk.linear(x, layer.gate.weight.detach()), 2, **given)
    got = dk.expert_mlp(x, dk.pack_experts(layer.experts.gate_up_proj), dk.pack_experts(layer.experts.down_proj), ids,
                        weights)
    torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(70, 96, 64, 6, 3), (70, 45, 40, 6, 3)])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(isa, dtype, shape):
    x, gate_up, down, ids, weights, biases = problem(dtype, *shape)
    ids[:20, 0] = 2  # an expert of many rows, one of them twice
    packed = dk.pack_experts(gate_up), dk.pack_experts(down)
    whole = dk.expert_mlp(x, *packed, ids, weights, **biases)
    for at in (*(slice(start, start + 1) for start in (0, 19, 69)), slice(8, 16), slice(31, 47), slice(0, 33)):
        assert same_bits(dk.expert_mlp(x[at], *packed, ids[at], weights[at], **biases), whole[at]), at
    order = torch.randperm(70)
    assert same_bits(dk.expert_mlp(x[order], *packed, ids[order], weights[order], **biases), whole[order])


def test_a_row_s_bits_do_not_depend_on_what_the_others_chose(isa, dtype):
    x, gate_up, down, ids, weights, _ = problem(dtype, 12, 64, 48, 8, 3)
    packed = dk.pack_experts(gate_up), dk.pack_experts(down)
    alone = dk.expert_mlp(x[5:6], *packed, ids[5:6], weights[5:6])
    for others in (ids[5].expand(12, 3), torch.full((12, 3), 7), torch.full((12, 3), -1), torch.arange(36).view(
            12, 3) % 8):
        beside = others.int().clone()
        beside[5] = ids[5]
        assert same_bits(dk.expert_mlp(x, *packed, beside, weights)[5:6], alone)


def test_more_rows_than_are_taken_at_once(isa):
    x, gate_up, down, ids, weights, _ = problem(torch.bfloat16, *MANY)
    packed = dk.pack_experts(gate_up), dk.pack_experts(down)
    whole = dk.expert_mlp(x, *packed, ids, weights)
    parts = [dk.expert_mlp(*some, *packed, *more) for some, *more in (
        ((x[at],), ids[at], weights[at]) for at in (slice(0, 100), slice(100, 530)))]
    assert same_bits(torch.cat(parts), whole)


def test_bits_do_not_depend_on_threads(isa, dtype, by_threads):
    x, gate_up, down, ids, weights, _ = problem(dtype, 9, 256, 320, 4, 2)
    packed = dk.pack_experts(gate_up), dk.pack_experts(down)
    got = by_threads(lambda: dk.expert_mlp(x, *packed, ids, weights))
    assert same_bits(got[0], got[1]) and same_bits(got[0], got[2])


def test_the_sum_is_in_the_order_of_the_slots(isa):
    """1e8 + 1 is 1e8 in float32, so that each order gives another sum."""
    gate_up, down = torch.zeros(3, 2, 1), torch.ones(3, 1, 1)
    gate_up[:, 0], gate_up[:, 1] = 100.0, torch.tensor([[1e6], [-1e6], [0.01]])
    x, weights, packed = torch.ones(1, 1), torch.ones(1, 3), None
    packed = dk.pack_experts(gate_up), dk.pack_experts(down)
    for order, want in (((0, 1, 2), 1.0), ((0, 2, 1), 0.0), ((2, 0, 1), 0.0), ((1, 0, 2), 1.0)):
        assert dk.expert_mlp(x, *packed, int32(*order)[None], weights).item() == want, order


def test_hidden_rows_are_rounded_once_and_the_result_once(isa, dtype):
    x, gate_up, down, ids, weights, biases = problem(dtype, 6, 32, 32, 4, 2)
    got = dk.expert_mlp(x, gate_up, down, ids, weights, **biases)
    want = from_reference(x, gate_up, down, ids, weights, **biases, dtype=dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(got, want)
    else:  # a bit of a sum may fall on the other side of a rounding
        assert (got != want).float().mean() < 0.1


def test_experts_of_other_ranks_add_nothing(isa, dtype):
    x, gate_up, down, ids, weights, biases = problem(dtype, 20, 40, 24, 6, 3)
    some = {name: bias[2:5].contiguous() for name, bias in biases.items()}
    ids[3] = -1
    ids[7] = int32(0, 1, 5)
    got = dk.expert_mlp(x, gate_up[2:5], down[2:5], ids, weights, **some, first_expert=2, num_experts=6)
    inside = (ids >= 2) & (ids < 5)
    want = dk.expert_mlp(x, gate_up, down, torch.where(inside, ids, -1), weights, **biases)
    assert same_bits(got, want) and (got[[3, 7]] == 0).all()
    for far in (2**31 - 1, -2**31, 6):
        assert same_bits(dk.expert_mlp(x, gate_up[2:5], down[2:5], torch.where(inside, ids, far), weights, **some,
                                       first_expert=2, num_experts=6), want)


def test_nan_and_infinities_stay_in_the_rows_that_chose_them(isa, dtype):
    x, gate_up, down, ids, weights, _ = problem(dtype, 8, 32, 24, 4, 2)
    ids[:] = int32(0, 1)
    ids[5] = int32(3, 2)
    clean = dk.expert_mlp(x, gate_up, down, ids, weights)
    gate_up[3], gate_up[2, 0, 0] = float("nan"), float("inf")
    for activation in ACTIVATIONS:
        got = dk.expert_mlp(x, dk.pack_experts(gate_up), dk.pack_experts(down), ids, weights, activation=activation)
        assert got[5].isnan().all()
        if activation == "silu":
            keep = torch.arange(8) != 5
            assert same_bits(got[keep], clean[keep])


def test_strided_rows_and_untouched_neighbours(isa, dtype):
    x, gate_up, down, ids, weights, _ = problem(dtype, 6, 40, 24, 4, 2)
    wide, out = torch.full((6, 100), float("nan")).to(dtype), torch.full((6, 100), 7.0).to(dtype)
    wide[:, 30:70] = x
    dk.expert_mlp(wide[:, 30:70], gate_up, down, ids, weights, out=out[:, 30:70])
    assert same_bits(out[:, 30:70].contiguous(), dk.expert_mlp(x, gate_up, down, ids, weights))
    assert (out[:, :30] == 7).all() and (out[:, 70:] == 7).all()


def test_a_recorded_call_reads_ids_and_weights_when_it_is_replayed(isa):
    x, gate_up, down, ids, weights, _ = problem(torch.float32, 4, 32, 24, 6, 2)
    packed, graph, out = (dk.pack_experts(gate_up), dk.pack_experts(down)), dk.StepGraph(), torch.empty(4, 32)
    if not dk.StepGraph.available("cpu"):
        pytest.skip("nothing to record")
    with graph.capture():
        dk.expert_mlp(x, *packed, ids, weights, out=out)
    ids.copy_((ids + 1) % 6)
    weights.mul_(2)
    x.neg_()
    graph.replay()
    assert same_bits(out, dk.expert_mlp(x, *packed, ids, weights))


def test_an_id_that_no_expert_has_is_named_where_values_are_checked(monkeypatch):
    x, gate_up, down, ids, weights, _ = problem(torch.float32, 4, 32, 24, 6, 2)
    monkeypatch.setenv("DFLASH_CHECK", "1")
    ids[1, 0] = -1
    dk.expert_mlp(x, gate_up, down, ids, weights)
    for wrong in (6, -2):
        ids[2, 1] = wrong
        with pytest.raises(ValueError, match=f"expert_mlp: ids must be between -1 and 5, of 6 experts; got {wrong}"):
            dk.expert_mlp(x, gate_up, down, ids, weights)
    ids[2, 1] = 6
    dk.expert_mlp(x, gate_up, down, ids, weights, num_experts=7)


def test_bad_input_names_what_was_expected_and_got():
    x, gate_up, down, ids, weights, biases = problem(torch.float32, 4, 32, 24, 6, 2)
    good = {"x": x, "gate_up": gate_up, "down": down, "ids": ids, "weights": weights}
    for error, text, given in (
            (ValueError, "gate_up must have 32 = x's H columns; got 31", {"gate_up": gate_up[:, :, 1:].contiguous()}),
            (ValueError, "gate_up must have 2I rows, an even number; got 47", {"gate_up": gate_up[:, 1:].contiguous()}),
            (ValueError, "down must have 24 = gate_up's I columns; got 23", {"down": dk.pack_experts(down[:, :, 1:])}),
            (ValueError, r"down must be \(E, H, I\) = \(6, 32, 24\); got \(5, 32, 24\)", {"down": down[1:]}),
            (TypeError, "down must be torch.float32, as x is; got packed torch.bfloat16",
             {"down": dk.pack_experts(down.bfloat16())}),
            (TypeError, r"ids must be int32 \(T, k\); got int64 \(4, 2\)", {"ids": ids.long()}),
            (ValueError, r"weights must have shape \(T, k\) = \(4, 2\); got float32 \(4, 1\)",
             {"weights": weights[:, :1].contiguous()}),
            (ValueError, r"gate_up_bias must have shape \(E, 2I\) = \(6, 48\)",
             {"gate_up_bias": biases["gate_up_bias"][:5]}),
            (ValueError, "activation must be silu or clamped; got 'gelu'", {"activation": "gelu"}),
            (ValueError, "num_experts must be at least 8 = first_expert . E; got 7",
             {"first_expert": 2, "num_experts": 7})):
        with pytest.raises(error, match=f"expert_mlp: {text}"):
            dk.expert_mlp(**(good | given))
    text = dk.supports("expert_mlp", dtype=torch.float32, weight_dtype=torch.bfloat16).reason
    with pytest.raises(TypeError) as error:
        dk.expert_mlp(**(good | {"gate_up": dk.pack_experts(gate_up.bfloat16())}))
    assert str(error.value) == text
    assert dk.supports("expert_mlp", dtype=torch.bfloat16, weight_dtype=torch.int8)
