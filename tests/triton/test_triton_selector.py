import pytest
import torch

from dflash_kernels import SamplingTensors, reference
from dflash_kernels._triton.selector import select_candidates
from dflash_kernels.testing import assert_within_budget
from tests.kernels.test_selector import INF, NAN, OPTIONAL, V, problem, settings

CANARY = 77


def fields(params):
    return (None,) * 5 if params is None else (params.temperature, params.seeds, params.top_k, params.top_p,
                                               params.min_p)


def agree(arguments, params=None):
    shape = arguments["values"].shape
    results = []
    for function in (select_candidates, reference.selector.select_candidates):
        out, logprobs = torch.full((shape[0], shape[1] + 2), CANARY)[:, 1:-1], torch.full(shape[:2], NAN)
        probs = None if params is None else torch.full(shape, NAN)
        function(*arguments.values(), *fields(params), out, logprobs, probs)
        assert (out._base[:, [0, -1]] == CANARY).all()
        results.append((out, logprobs, probs))
    (got, logprobs, probs), (want, like, q) = results
    assert torch.equal(got, want)
    torch.testing.assert_close(logprobs, like, atol=1e-5, rtol=1e-5, equal_nan=True)
    if params is not None:
        assert_within_budget(probs, q.double(), ulps=64)
    return got


@pytest.mark.parametrize("k,rank,dtype", [(1, 5, torch.float32), (16, 256, torch.float16), (33, 96, torch.float32),
                                          (64, 7, torch.float16)])
def test_agrees_with_all_edges_of_the_reference(k, rank, dtype):
    arguments = problem(n=3, k=k, rank=rank, dtype=dtype)
    greedy = agree(arguments)
    assert k == 1 or not torch.equal(greedy, arguments["ids"][..., 0])
    agree(arguments, settings())
    agree(arguments, settings(**OPTIONAL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_markov_head_has_no_hidden(dtype):
    arguments = problem(n=3, rank=96, dtype=dtype) | {"hidden": None}
    drafts = agree(arguments)
    agree(arguments, settings(**OPTIONAL))
    arguments["predecessor"].zero_()
    assert not torch.equal(agree(arguments), drafts)


def test_first_of_equal_scores_first_nan_and_tokens_outside():
    arguments = problem(b=5, n=1, k=3)
    for name in ("predecessor", "successor"):
        arguments[name].zero_()
    arguments["values"] = torch.tensor([[[1.0, 1.0, 0.0]], [[NAN, 2.0, NAN]], [[2.0, 3.0, NAN]], [[-INF, -INF, -INF]],
                                        [[0.0, 1.0, 1.0]]])
    arguments["anchor_ids"] = torch.tensor([-1, V, 2**40, -2**62, 3])
    arguments["ids"][4] = torch.tensor([-1, V, 2**31])
    ids = arguments["ids"][:, 0]
    want = torch.stack([ids[0, 0], ids[1, 0], ids[2, 2], ids[3, 0], ids[4, 1]])
    for params in (None, SamplingTensors(torch.zeros(5), torch.arange(5))):
        assert torch.equal(agree(arguments, params)[:, 0], want)


def test_products_and_their_sum_are_rounded():
    eps, ids, zero = torch.finfo(torch.float16).eps, torch.tensor([[[1, 2]]]), torch.zeros(1, dtype=torch.int32)
    for first, rows in (([1 + eps, 1.0], [[0.0, 0.0], [1.0, -1 - 2 * eps]]),
                        ([1.0, 1.0], [[1.0, 0.0], [1.0, eps / 2]])):
        predecessor, successor = torch.zeros(3, 2), torch.zeros(3, 2)
        predecessor[0], successor[1:] = torch.tensor(first), torch.tensor(rows)
        out = torch.empty(1, 1, dtype=torch.int64)
        select_candidates(torch.zeros(1, 1, 2), ids, torch.tensor([[first]]).half(), torch.tensor([0]),
                          predecessor.half(), successor.half(), zero, *fields(None), out, torch.empty(1, 1), None)
        assert out.item() == 1
