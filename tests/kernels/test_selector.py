"""The selector's walk. Inputs of few significant bits make every score exact, whatever the order of its sum."""

import pytest
import torch

from dflash_kernels import (
    Proposal,
    SamplingTensors,
    StepGraph,
    combine_topk,
    lm_head_topk,
    reference,
    select_candidates,
    verify_sample,
)
from dflash_kernels.testing import assert_within_budget, same_bits
from tests.support import sampling_distribution as chains
from tests.support.op_samples import int32

V = 211
INF, NAN = float("inf"), float("nan")
OPTIONAL = {"top_k": int32(0, 3, 2, 5, 1), "top_p": torch.tensor([1.0, 0.7, 0.0, 0.9, 1.0]),
            "min_p": torch.tensor([0.0, 0.05, 0.2, 0.0, 0.5])}


def problem(b=5, n=4, k=16, rank=256, dtype=torch.float32):
    """Numbers in eighths, codebooks and hidden states of -1, 0 and 1."""
    def few(*shape):
        return torch.randint(-1, 2, shape).to(dtype)

    ids = torch.stack([torch.randperm(V)[:k] for _ in range(b * n)]).view(b, n, k)
    values = (torch.randn(b, n, k) * 16).round().div(8).sort(-1, descending=True).values
    return {"values": values, "ids": ids, "hidden": few(b, n, rank), "anchor_ids": torch.randint(0, V, (b,)),
            "predecessor": few(V, rank), "successor": few(V, rank),
            "context_lens": torch.arange(b, dtype=torch.int32) * 7}


def settings(b=5, **filters):
    return SamplingTensors(torch.linspace(0.0, 3.0, b), torch.arange(b) * 31, **filters)


def by_reference(arguments, params=None):
    values = arguments["values"]
    out = torch.empty(values.shape[:2], dtype=torch.int64), torch.empty(values.shape[:2])
    probs = None if params is None else torch.empty_like(values)
    given = (None,) * 5 if params is None else (params.temperature, params.seeds, params.top_k, params.top_p,
                                                params.min_p)
    reference.selector.select_candidates(*arguments.values(), *given, *out, probs)
    return *out, probs


def agree(arguments, params=None):
    got, want = select_candidates(**arguments, params=params), by_reference(arguments, params)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5, equal_nan=True)
    if params is None:
        assert got[2] is None
    else:
        assert_within_budget(got[2], want[2].double(), ulps=64)
    return got


@pytest.mark.parametrize("k,rank", [(1, 5), (16, 256), (33, 96), (64, 7)])
def test_agrees_with_all_edges_of_the_reference(vector_isa, dtype, k, rank):
    arguments = problem(k=k, rank=rank, dtype=dtype)
    drafts, _, _ = agree(arguments)
    agree(arguments, settings())
    _, _, probs = agree(arguments, settings(**OPTIONAL))
    assert k == 1 or not torch.equal(drafts, arguments["ids"][..., 0])
    assert same_bits(probs[0].sum(-1), torch.ones(4)) and bool(((probs == 0) | (probs == 1))[0].all())


def test_without_hidden_it_is_as_with_ones(vector_isa, dtype):
    """A Markov head; random codebooks, so that a rounding too many would show."""
    arguments = problem(rank=100, dtype=dtype)
    for name in ("predecessor", "successor"):
        arguments[name] = torch.randn(V, 100).to(dtype)
    for params in (None, settings(**OPTIONAL)):
        got = select_candidates(**arguments | {"hidden": None}, params=params)
        ones = select_candidates(**arguments | {"hidden": torch.ones_like(arguments["hidden"])}, params=params)
        assert all(same_bits(a, b) for a, b in zip(got, ones, strict=True) if a is not None)
    agree(problem(rank=100, dtype=dtype) | {"hidden": None})


def test_a_greedy_request_drafts_the_same_among_sampled_ones(vector_isa, dtype):
    arguments = problem(dtype=dtype)
    mixed = select_candidates(**arguments, params=settings())
    assert torch.equal(mixed[0][0], select_candidates(**arguments)[0][0])
    assert not torch.equal(mixed[0], select_candidates(**arguments)[0])


def test_each_choice_follows_the_one_before_it(vector_isa):
    """Token t is followed by t + 1 alone, and the head says nothing: any other predecessor gives another chain."""
    rank, n = 64, 6
    eye = torch.eye(rank)
    ids = torch.stack([torch.randperm(rank) for _ in range(n)])[None]
    arguments = {"values": torch.zeros(1, n, rank), "ids": ids, "hidden": torch.ones(1, n, rank),
                 "anchor_ids": torch.tensor([9]), "predecessor": eye, "successor": eye.roll(1, 0),
                 "context_lens": int32(0)}
    assert select_candidates(**arguments)[0].tolist() == [[10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize("first", [0, 64, 255])
def test_every_dimension_of_the_rank_counts(vector_isa, dtype, first):
    """The signal is in dimensions from `first` on, and for the last candidate."""
    arguments = problem(b=1, n=1, dtype=dtype)
    for name in ("predecessor", "successor"):
        arguments[name].zero_()[:, first:] = 1
    arguments["hidden"].zero_()[..., first:] = 1
    arguments["values"] = torch.zeros_like(arguments["values"])
    arguments["successor"][arguments["ids"][0, :, :15].flatten()] = 0
    arguments["successor"][arguments["ids"][0, :, 15], first:] = 1
    got, logprobs, _ = select_candidates(**arguments)
    assert torch.equal(got, arguments["ids"][..., 15]) and (logprobs > -2.2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_and_their_sum_are_rounded(vector_isa, dtype):
    """Two candidates tie where the product, or the sum, is rounded; the second one wins where it is not."""
    eps = torch.finfo(dtype).eps
    one = torch.tensor([1 + eps, 1.0])
    ids = torch.tensor([[[1, 2]]])
    common = {"values": torch.zeros(1, 1, 2), "ids": ids, "anchor_ids": torch.tensor([0]), "context_lens": int32(0)}
    predecessor, successor = torch.zeros(3, 2), torch.zeros(3, 2)
    predecessor[0], successor[2] = one, torch.tensor([1.0, -1 - 2 * eps])
    arguments = common | {"hidden": one.to(dtype)[None, None], "predecessor": predecessor.to(dtype),
                          "successor": successor.to(dtype)}
    assert float(one[0]) ** 2 > 1 + 2 * eps and select_candidates(**arguments)[0].item() == 1
    predecessor[0], successor[1:] = 1.0, torch.tensor([[1.0, 0.0], [1.0, eps / 2]])
    arguments |= {"hidden": torch.ones(1, 1, 2, dtype=dtype), "predecessor": predecessor.to(dtype),
                  "successor": successor.to(dtype)}
    assert select_candidates(**arguments)[0].item() == 1
    wide = {name: t.float() if name in ("hidden", "predecessor", "successor") else t for name, t in arguments.items()}
    assert select_candidates(**wide)[0].item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_dflash_package_scores_and_walks_the_same(dtype, temperature, monkeypatch):
    """Greedy paths are equal. Sampled ones are replayed with the package's choices made for it."""
    model = pytest.importorskip("dflash.model")
    arguments, b, n = problem(dtype=dtype), 5, 4
    theirs = model.CandidateSelector.__new__(model.CandidateSelector)
    torch.nn.Module.__init__(theirs)
    theirs.top_k, theirs.hidden_projection = 16, torch.nn.Identity()
    for name in ("predecessor", "successor"):
        setattr(theirs, f"{name}_codebook", torch.nn.Embedding.from_pretrained(arguments[name]))
    logits = torch.full((b, n, V), -INF).scatter_(-1, arguments["ids"], arguments["values"])
    ours = SamplingTensors(torch.full((b,), temperature), torch.arange(b)) if temperature else None
    drafts, _, probs = select_candidates(**arguments, params=ours)
    if temperature:
        # Ties have no order in their top-k: our choice, found among their candidates.
        chosen = iter(drafts.T)
        monkeypatch.setattr(model, "_sample_probs", lambda q: (
            theirs.found[:, next(theirs.at)] == next(chosen)[:, None]).long().argmax(-1))
        topk = torch.topk
        theirs.at = iter(range(n))

        def noted(*args, **kwargs):
            found = topk(*args, **kwargs)
            theirs.found = found.indices
            return found

        monkeypatch.setattr(model.torch, "topk", noted)
    path, candidates, q = theirs.select(arguments["hidden"], logits.to(dtype), arguments["anchor_ids"], temperature)
    assert torch.equal(candidates.sort(-1).values, arguments["ids"].sort(-1).values)
    if temperature:
        order, own = candidates.argsort(-1), arguments["ids"].argsort(-1)
        torch.testing.assert_close(q.gather(-1, order).float(), probs.gather(-1, own), atol=1e-2 if dtype
                                   == torch.bfloat16 else 1e-5, rtol=0)
    else:
        scores = reference.selector.edges(*list(arguments.values())[:6])
        unique = scores.max(-1).values  # where the largest score is unique, their order of ties does not matter
        clear = ((scores == unique[..., None]).sum(-1) == 1).all(-1).all(-1)
        assert clear.sum() >= 1 and torch.equal(path[clear], drafts[clear])


def test_first_of_equal_scores_and_first_nan(vector_isa):
    arguments = problem(b=4, n=1, k=4)
    for name in ("predecessor", "successor"):
        arguments[name].zero_()
    arguments["values"] = torch.tensor([[[1.0, 1.0, 1.0, 0.0]], [[NAN, 2.0, NAN, 0.0]], [[2.0, 3.0, NAN, NAN]],
                                        [[-INF, -INF, -INF, -INF]]])
    ids = arguments["ids"][:, 0]
    want = torch.tensor([ids[0, 0], ids[1, 0], ids[2, 2], ids[3, 0]])
    for params in (None, SamplingTensors(torch.zeros(4), torch.arange(4))):
        assert torch.equal(agree(arguments, params)[0][:, 0], want)


def test_tokens_outside_the_vocabulary_have_rows_of_zeros(vector_isa, dtype):
    arguments = problem(dtype=dtype)
    arguments["anchor_ids"] = torch.tensor([-1, V, 2**40, -2**62, 3])
    arguments["ids"][1:, :, ::3] = torch.tensor([-1, V, 2**31, -2**40])[:, None, None]
    agree(arguments)
    agree(arguments, settings())


def test_a_request_s_bits_are_its_own(vector_isa, dtype, by_threads):
    arguments = problem(b=9, n=7, rank=100, dtype=dtype)
    for name in ("hidden", "predecessor", "successor"):
        arguments[name] = torch.randn(arguments[name].shape).to(dtype)
    shared = ("predecessor", "successor")

    def run(rows=slice(None)):
        params = settings(9, min_p=torch.full((9,), 0.01))
        few = SamplingTensors(params.temperature[rows], params.seeds[rows], min_p=params.min_p[rows])
        return select_candidates(**{n: t if n in shared else t[rows].contiguous() for n, t in arguments.items()},
                                 params=few)

    whole, *others = by_threads(run)
    for other in others:
        assert all(map(same_bits, whole, other))
    for i in (0, 4, 8):
        assert all(same_bits(got, want[i:i + 1]) for got, want in zip(run(slice(i, i + 1)), whole, strict=True))


def test_shards_of_the_vocabulary_give_the_same_drafts():
    x, head, arguments = torch.randn(5, 4, 24).bfloat16(), torch.randn(V, 24).bfloat16(), problem()
    whole = lm_head_topk(x, head, 16)
    parts = [lm_head_topk(x, head[at:at + 106], 16, id_offset=at) for at in (0, 106)]
    ids, values, lse = (torch.stack(t).view(2, 20, *t[0].shape[2:]) for t in zip(*parts, strict=True))
    ids, values, _ = combine_topk(values, ids, lse)
    found = [select_candidates(**arguments | {"ids": i.view(5, 4, 16), "values": v.view(5, 4, 16)})[0]
             for i, v in (whole[:2], (ids, values))]
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_text_that_verify_sample_accepts_follows_the_target(rule):
    """Candidates and codebooks know little of the target; what is emitted is the target's all the same."""
    table, head = chains.chain(3)
    params = chains.params(6000, 1.0, {"top_k": 12}, greedy_every=50)
    top = head.topk(8)
    codebooks = [torch.randn(chains.V, 4) * 0.4 for _ in range(2)]

    def drafts(kind, distribution, lens, logits, anchors):
        b = len(lens)
        values, ids = (t.expand(b, -1, -1).contiguous() for t in (top.values, top.indices))
        chosen, _, probs = select_candidates(values, ids, torch.ones(b, len(logits), 4), anchors, *codebooks, lens,
                                             distribution)
        return chosen, Proposal(probs=probs, ids=ids)

    text, accepted = decode(table, head, rule, params, drafts)
    found = chains.p_values(table, text, params)
    assert min(found.values()) > 1e-4 and accepted > 0.3, (found, accepted)


def decode(table, head, rule, params, drafts):
    """The first POSITIONS tokens of every request, as in sampling_distribution, with drafts that see the anchor."""
    b = len(params.seeds)
    lens, anchor = torch.full((b,), 11, dtype=torch.int32), torch.full((b,), chains.ANCHOR)
    text, have = torch.full((b, chains.POSITIONS + chains.WIDTH), -1), torch.zeros(b, dtype=torch.long)
    accepted = []
    while bool((have < chains.POSITIONS).any()):
        x, proposal = drafts("", params, lens, head, anchor)
        block = torch.cat((anchor[:, None], x), 1)
        widths = torch.where(have < chains.POSITIONS, chains.WIDTH, 0).int()
        out = verify_sample(block, table[block], lens, params, proposal=proposal, rule=rule, block_lens=widths)
        accepted.append(out.accept_lens[widths > 0].double().mean().item())
        for i in range(chains.WIDTH):
            here = (out.commit_lens > i) & (have + i < text.shape[1])
            text[here, have[here] + i] = out.tokens[here, i]
        have += out.commit_lens
        anchor, lens = torch.where(widths > 0, out.bonus, anchor), out.new_lens
    return text[:, :chains.POSITIONS], accepted[0]


def test_a_replay_reads_new_candidates_and_settings():
    arguments, params = problem(), settings()
    out = {"out_ids": torch.empty(5, 4, dtype=torch.int64), "out_logprobs": torch.empty(5, 4),
           "out_probs": torch.empty(5, 4, 16)}
    graph = StepGraph("cpu")
    with graph.capture():
        select_candidates(**arguments, params=params, **out)
    again = problem()
    for name, t in again.items():
        arguments[name].copy_(t)
    params.temperature.fill_(0.5)
    graph.replay()
    want = select_candidates(**again, params=params)
    assert len(graph) == 1 and all(map(same_bits, out.values(), want))


def test_columns_of_a_block_take_the_drafts_and_neighbours_stay(vector_isa):
    arguments = problem()
    block = torch.full((5, 6), 77)
    known = torch.full((5, 2), 77)
    known[:, 0] = arguments["anchor_ids"]
    select_candidates(**arguments | {"anchor_ids": known[:, 0]}, out_ids=block[:, 1:5])
    assert torch.equal(block[:, 1:5], select_candidates(**arguments)[0]) and (block[:, [0, 5]] == 77).all()


def test_bad_input_names_what_was_expected_and_got():
    good = problem(b=2, n=3, k=4, rank=6)
    for error, message, wrong in (
            (TypeError, r"values must be float32 \(B, Q - 1, K\); got bfloat16", {"values": good["values"].bfloat16()}),
            (ValueError, "k must be between 1 and 64; got 65", {"values": torch.zeros(2, 3, 65)}),
            (ValueError, r"ids must have shape .* = \(2, 3, 4\)", {"ids": good["ids"][..., :3]}),
            (TypeError, "ids must be int64", {"ids": good["ids"].int()}),
            (ValueError, r"hidden must have shape \(B, Q - 1, R\) = \(2, 3, 6\)", {"hidden": torch.zeros(2, 2, 6)}),
            (TypeError, "hidden must be float32", {"hidden": good["hidden"].half()}),
            (ValueError, "predecessor must have R >= 1", {"predecessor": torch.zeros(V, 0)}),
            (ValueError, r"successor must have shape \(V, R\) = \(211, 5\)", {"predecessor": torch.zeros(V, 5)}),
            (TypeError, "predecessor must be float32, .*; got int64", {"predecessor": good["predecessor"].long()}),
            (ValueError, rf"successor must have shape \(V, R\) = \({V}, 6\)", {"successor": torch.zeros(9, 6)}),
            (ValueError, r"anchor_ids must have shape \(B,\) = \(2\)", {"anchor_ids": torch.tensor([1])}),
            (ValueError, "out_probs must be given with params alone", {"out_probs": torch.zeros(2, 3, 4)}),
            (TypeError, "params must be SamplingTensors", {"params": 0.5})):
        with pytest.raises(error, match=f"select_candidates: .*{message}"):
            select_candidates(**good | wrong)
