import pytest
import torch

from dflash_kernels import reference
from dflash_kernels._triton.router import route_experts
from dflash_kernels.ops.router import SCORING
from dflash_kernels.testing import assert_within_budget
from tests.kernels.test_router import FORMS, INF, NAN, from_reference, problem

CANARY = 77


def run(logits, k, *, bias=None, scoring="softmax", groups=1, top_groups=1, group_best=2, normalize=True, scale=1.0):
    ids, weights = torch.full((len(logits) + 2, k), CANARY, dtype=torch.int32), torch.full((len(logits) + 2, k), 77.0)
    route_experts(logits, bias, SCORING[scoring], groups, top_groups, group_best, normalize, scale, ids[1:-1],
                  weights[1:-1])
    for t in (ids, weights):
        assert (t[[0, -1]] == CANARY).all()
    return ids[1:-1], weights[1:-1]


@pytest.mark.parametrize("form", FORMS)
def test_matches_reference(form):
    logits, k, given = problem(form, rows=3, dtype=torch.float16 if form in ("qwen3", "deepseek-v3") else torch.float32)
    ids, weights = run(logits, k, **given)
    want_ids, want = from_reference(logits, k, **given)
    assert torch.equal(ids, want_ids)
    assert_within_budget(weights, want, want.float(), ulps=32)


@pytest.mark.parametrize("given", [{}, {"scoring": "sigmoid"}, {"normalize": False}, {"groups": 2, "top_groups": 1},
                                   {"groups": 2, "top_groups": 1, "group_best": 1, "scoring": "sigmoid"}], ids=str)
def test_first_of_equal_experts_nan_and_infinities(given):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, -0.0, 0.0, -1.0], [NAN, 5.0, NAN, INF], [1.0, 2.0, NAN, INF],
                           [-INF] * 4, [-INF, 1.0, -INF, -INF]])
    ids, weights = torch.empty(6, 2, dtype=torch.int32), torch.empty(6, 2)
    arguments = {"scoring": "softmax", "groups": 1, "top_groups": 1, "group_best": 2, "normalize": True} | given
    arguments["scoring"] = SCORING[arguments["scoring"]]
    reference.router.route_experts(logits, None, *arguments.values(), 1.0, ids, weights)
    got, found = run(logits, 2, **given)
    assert torch.equal(got, ids)
    torch.testing.assert_close(found, weights, equal_nan=True)


def test_strided_rows_and_no_rows():
    wide = torch.full((3, 40), NAN)
    wide[:, 3:15] = torch.randn(3, 12)
    assert torch.equal(run(wide[:, 3:15], 3)[0], run(wide[:, 3:15].contiguous(), 3)[0])
    assert run(torch.empty(0, 12), 3)[0].shape == (0, 3)
