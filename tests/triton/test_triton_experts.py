import pytest
import torch

from dflash_kernels._triton import experts as kernels
from dflash_kernels.ops.experts import ACTIVATIONS
from dflash_kernels.testing import assert_within_budget, doubles, same_bits
from tests.kernels.test_experts import from_reference, problem, quantized, torch_like
from tests.support.launches import launches
from tests.support.op_samples import int32

# rows, H, I, experts, slots: one row; tails of every block; more pairs than a tile; tiles of 32; no row
SHAPES = [(1, 32, 32, 4, 2), (5, 70, 37, 6, 3), (40, 33, 40, 3, 2), (60, 20, 16, 2, 2), (0, 32, 16, 4, 2)]


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def run(x, gate_up, down, ids, weights, gate_up_bias=None, down_bias=None, activation="silu", first_expert=0,
        scales=(None, None), out=None):
    out = torch.full_like(x, float("nan")) if out is None else out
    kernels.expert_mlp(x, gate_up, down, *scales, ids, weights, gate_up_bias, down_bias, down.shape[2],
                       ACTIVATIONS[activation], first_expert, out)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(dtype, shape):
    x, gate_up, down, ids, weights, biases = problem(dtype, *shape)
    for given in (biases | {"activation": "clamped"}, {}):
        want = from_reference(x, gate_up, down, ids, weights, **given)
        like = torch_like(x, gate_up, down, ids, weights, **given)
        assert_within_budget(run(x, gate_up, down, ids, weights, **given), want, like, factor=4)


def test_tiles_have_16_rows_or_32():
    assert [kernels.rows_of_tile(pairs, experts) for pairs, experts in ((1, 256), (2048, 256), (80, 3), (120, 2))] == [
        16, 16, 32, 32]


def test_weights_in_8_bits(dtype):
    x, gate_up, down, ids, weights, biases = problem(dtype, *SHAPES[1])
    (q, scales), (p, others) = quantized(gate_up), quantized(down)
    wide = (q * scales[:, :, None]).to(dtype), (p * others[:, :, None]).to(dtype)
    want = from_reference(x, q, p, ids, weights, scales=doubles(scales, others), **biases)
    assert_within_budget(run(x, q, p, ids, weights, scales=(scales, others), **biases), want,
                         torch_like(x, *wide, ids, weights, **biases), factor=4)


def test_experts_of_other_ranks_add_nothing(dtype):
    x, gate_up, down, ids, weights, biases = problem(dtype, 20, 40, 24, 6, 3)
    some = {name: bias[2:5].contiguous() for name, bias in biases.items()}
    ids[3], ids[7] = -1, int32(0, 1, 5)
    inside = (ids >= 2) & (ids < 5)
    want = run(x, gate_up, down, torch.where(inside, ids, -1), weights, **biases)
    for far in (2**31 - 1, -2**31, 6):
        got = run(x, gate_up[2:5], down[2:5], torch.where(inside, ids, far), weights, **some, first_expert=2)
        assert same_bits(got, want) and (got[[3, 7]] == 0).all()


def test_the_sum_is_in_the_order_of_the_slots():
    gate_up, down = torch.zeros(3, 2, 1), torch.ones(3, 1, 1)
    gate_up[:, 0], gate_up[:, 1] = 100.0, torch.tensor([[1e6], [-1e6], [0.01]])
    for order, want in (((0, 1, 2), 1.0), ((0, 2, 1), 0.0), ((2, 0, 1), 0.0), ((1, 0, 2), 1.0)):
        assert run(torch.ones(1, 1), gate_up, down, int32(*order)[None], torch.ones(1, 3)).item() == want, order


def test_a_row_sees_none_of_its_neighbours(dtype):
    """What the interpreter can show: a NaN stays in its row in every tiling. That bits agree is for a GPU to show."""
    for rows in (3, 40):
        x, gate_up, down, ids, weights, _ = problem(dtype, rows, 40, 24, 3, 2)
        clean = run(x, gate_up, down, ids, weights)
        x[1, 5] = float("nan")
        got, keep = run(x, gate_up, down, ids, weights), torch.arange(rows) != 1
        assert got[1].isnan().all() and same_bits(got[keep], clean[keep])


def test_more_rows_than_are_taken_at_once(dtype, monkeypatch):
    x, gate_up, down, ids, weights, _ = problem(dtype, 7, 40, 24, 3, 2)
    whole = run(x, gate_up, down, ids, weights)
    monkeypatch.setattr(kernels, "PAIRS", 5)
    torch.testing.assert_close(run(x, gate_up, down, ids, weights), whole)


def test_strided_rows_and_untouched_neighbours(dtype):
    x, gate_up, down, ids, weights, _ = problem(dtype, 6, 40, 24, 4, 2)
    wide, out = torch.full((6, 100), float("nan")).to(dtype), torch.full((6, 100), 7.0).to(dtype)
    wide[:, 30:70] = x
    run(wide[:, 30:70], gate_up, down, ids, weights, out=out[:, 30:70])
    assert same_bits(out[:, 30:70].contiguous(), run(x, gate_up, down, ids, weights))
    assert (out[:, :30] == 7).all() and (out[:, 70:] == 7).all()


@pytest.mark.parametrize("rows", [1, 8, 256, 257, 1024])
def test_two_launches_of_programs_bounded_by_the_pairs_whatever_was_chosen(rows):
    """MiniMax-M2's layer: no program for experts that no pair could fill. The last ones are for experts elsewhere."""
    meta = lambda *shape, dtype=torch.float16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    with launches() as noted:
        run(meta(rows, 3072), meta(256, 3072, 3072), meta(256, 3072, 1536), meta(rows, 8, dtype=torch.int32),
            meta(rows, 8, dtype=torch.float32))
    pairs, tile = 8 * rows, 32 if rows > 512 else 16
    tiles = {1: 8, 8: 64}.get(rows, 257 + (pairs - 257) // tile)
    products = [("gate_up_kernel", (tiles, 24)), ("down_kernel", (tiles, 48))]
    assert noted == [("schedule_kernel", (tiles,))] * (rows > 256) + products


class Graph:
    """torch, whose empty memory is the same in every call, as in a graph, and at first absurd."""

    def __init__(self):
        self.held, self.at = [], 0

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, dtype, device):
        if self.at == len(self.held):
            self.held.append(torch.full(shape, float("nan") if dtype.is_floating_point else -(2**30), dtype=dtype))
        self.at += 1
        return self.held[self.at - 1]


def test_nothing_is_left_over_from_a_call_before(dtype, monkeypatch):
    """Of rows whose slots are in several tiles, of one with no expert here, and of one that has an expert twice."""
    x, gate_up, down, _, weights, _ = problem(dtype, *SHAPES[1])
    monkeypatch.setattr(kernels, "torch", Graph())
    for step in (1, 5, 0, 1):
        ids = (torch.arange(5)[:, None] * step + torch.arange(3)).int() % 6
        ids[step % 5], ids[3, 1] = -1, ids[3, 2]
        want = from_reference(x, gate_up, down, ids, weights).to(dtype)
        kernels.torch.at = 0
        torch.testing.assert_close(run(x, gate_up, down, ids, weights), want, rtol=0.01, atol=0.01)


def test_whoever_arrives_last_adds_in_the_order_of_the_slots(dtype, monkeypatch):
    """Programs run in the interpreter one after another: here the other way round too."""
    from triton.runtime.interpreter import interpreter_builder as builder

    given = problem(dtype, *SHAPES[2])[:5]
    want, set_to = run(*given), builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx",
                        lambda *at: set_to(*(n - 1 - i for i, n in zip(at, builder.grid_dim, strict=True))))
    assert same_bits(run(*given), want)


@pytest.mark.parametrize("shape", SHAPES[2:4])
def test_a_launch_of_its_own_finds_the_same_tiles(shape, monkeypatch):
    """Several blocks of pairs; some experts are elsewhere."""
    x, gate_up, down, ids, weights, _ = problem(torch.float32, *shape)
    ids[7:11] = -1
    want = run(x, gate_up, down, ids, weights)
    for within, block in ((2048, 32), (0, 32), (0, 512)):
        for name, value in (("FOUND_WITHIN", within), ("FIND_BLOCK", block), ("SCHEDULE_BLOCK", block)):
            monkeypatch.setattr(kernels, name, value)
        assert same_bits(run(x, gate_up, down, ids, weights), want), (within, block)


def test_rows_with_no_slot_are_zero():
    x, gate_up, down, ids, weights, _ = problem(torch.float32, 3, 8, 4, 2, 1)
    assert (run(x, gate_up, down, ids[:, :0], weights[:, :0]) == 0).all()
