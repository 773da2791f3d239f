import math

import pytest
import torch
import triton
import triton.language as tl

from dflash_kernels import Verified
from dflash_kernels._triton import sample as kernels
from dflash_kernels._triton import sample_distribution as sample_distribution
from dflash_kernels.ops.sample import workspace_size
from dflash_kernels.reference import sample as reference
from dflash_kernels.testing import assert_within_budget, same_bits
from tests.support.op_samples import CANARY, int32, verified
from tests.support.sampling_distribution import chi_square

INF, NAN = math.inf, math.nan
FIELDS = ("accept_lens", "commit_lens", "tokens", "bonus", "new_lens")
FORMS = ["one_hot", "sparse", "dense", "logits"]
RULES = [(form, rule) for form in FORMS for rule in ("token", "block") if form != "one_hot" or rule == "token"]


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def problem(vocab, form="one_hot", rule="token", dtype=torch.float32, b=3, q=3, k=4, seed=0, **given):
    """Arguments of the op before its outputs. Drafts come from a distribution that is somewhat like the target's."""
    torch.manual_seed(seed)
    logits = (torch.randn(b, q, vocab) * 2).to(dtype)
    temp = given.pop("temperature", torch.full((b,), 0.9))
    near = logits[:, :-1].float() + torch.randn(b, q - 1, vocab) * 0.5
    probs = candidates = draft_logits = None
    top = near.topk(min(k, vocab) if form == "sparse" else vocab)
    shares = torch.softmax(top.values / temp.clamp_min(1e-5)[:, None, None], -1)
    place = torch.zeros(b, q - 1, 1, dtype=torch.int64)
    if form != "one_hot":
        place = torch.multinomial(shares.flatten(0, 1), 1).view(b, q - 1, 1)
    if form == "sparse":
        candidates, probs = top.indices, shares
    elif form == "dense":
        probs = torch.zeros(b, q - 1, vocab).scatter_(-1, top.indices, shares)
    elif form == "logits":
        draft_logits = near.to(dtype)
    drafts = torch.cat((torch.full((b, 1), 3), top.indices.gather(-1, place)[..., 0]), 1)
    arguments = dict(draft_ids=drafts, logits=logits, context_lens=int32(*range(7, 7 + b)), temperature=temp,
                     seeds=torch.arange(b) * 7919 + seed, top_k=None, top_p=None, min_p=None, draft_probs=probs,
                     draft_candidates=candidates, draft_logits=draft_logits, seen=None, repetition_penalty=None,
                     bias=None, bitmask=None, block_lens=None, block_rule=rule == "block")
    assert given.keys() <= arguments.keys()
    return arguments | given


def run(function, arguments, out=None, workspace=None):
    b, q, vocab = arguments["logits"].shape
    out = verified(b, q) if out is None else out
    if workspace is None:
        workspace = torch.full((workspace_size(b, q, vocab),), NAN)
    assert function(*arguments.values(), *(getattr(out, f) for f in FIELDS), workspace) is None
    return Verified(*(getattr(out, f).contiguous() for f in FIELDS))


def assert_as_reference(arguments):
    got, want = run(kernels.verify_sample, arguments), run(reference.verify_sample, arguments)
    for f in FIELDS:
        assert torch.equal(getattr(got, f), getattr(want, f)), f"{f}: {getattr(got, f)} != {getattr(want, f)}"
    return got


FILTERS = {"top_k": int32(0, 9, 0, 0, 12), "top_p": torch.tensor([1.0, 1.0, 0.7, 1.0, 0.9]),
           "min_p": torch.tensor([0.0, 0.0, 0.0, 0.1, 0.03])}


@pytest.mark.parametrize("form,rule", RULES)
def test_requests_with_each_filter_beside_each_other(dtype, form, rule):
    temp = torch.tensor([0.0, 1.0, 0.8, 1.2, 1.5])
    assert_as_reference(problem(1025, form, rule, dtype, b=5, q=2, temperature=temp, **FILTERS))


@pytest.mark.parametrize("vocab", [1, 33, 1024, 3000])
@pytest.mark.parametrize("form,rule", RULES)
def test_vocabularies(form, rule, vocab):
    assert_as_reference(problem(vocab, form, rule, q=4, seed=vocab, block_lens=int32(4, 2, 0)))


def test_filters_over_several_chunks_whose_tops_differ(dtype):
    arguments = problem(3000, dtype=dtype, b=3, q=1, top_k=int32(5, 3000, 1), top_p=torch.tensor([1.0, 0.9, 0.99]))
    arguments["logits"][:, :, 1024:2048] += 4
    assert_as_reference(arguments)


def words(*shape):
    return torch.randint(-2**31, 2**31, shape).int()


@pytest.mark.parametrize("form", ["one_hot", "sparse"])
def test_adjustments_at_their_strides(dtype, form):
    arguments = problem(100, form, dtype=dtype, q=2, repetition_penalty=torch.tensor([1.0, 1.3, 0.7]),
                        top_p=torch.tensor([0.9, 1.0, 0.8]))
    arguments |= dict(seen=words(3, 1, 6).expand(3, 2, 6)[..., 1:5], bitmask=words(1, 2, 4).expand(3, 2, 4),
                      bias=torch.randn(3, 2, 130)[..., 20:120])
    assert_as_reference(arguments)


def test_p32_rows_tails_and_padding_that_cannot_matter_are_poison(dtype):
    arguments = problem(1100, "sparse", dtype=dtype, q=3, block_lens=int32(2, 0, 3))
    want, (b, q, vocab) = run(reference.verify_sample, arguments), arguments["logits"].shape
    wide = torch.full((b, q + 2, vocab + 60), NAN, dtype=dtype)
    wide[:, 1:-1, 7:-53] = arguments["logits"]
    arguments["logits"] = wide[:, 1:-1, 7:-53]
    probs, ids = torch.full((b, q, 9), NAN), torch.full((b, q, 9), 2**62)
    probs[:, :-1, 2:6], ids[:, :-1, 2:6] = arguments["draft_probs"], arguments["draft_candidates"]
    arguments |= dict(draft_probs=probs[:, :-1, 2:6], draft_candidates=ids[:, :-1, 2:6])
    for row, width in enumerate(arguments["block_lens"].tolist()):
        wide[row, 1 + width:], arguments["draft_ids"][row, width:] = NAN, 2**62
        probs[row, max(width - 1, 0):], ids[row, max(width - 1, 0):] = NAN, -(2**62)
    out, workspace = verified(b, q), torch.full((workspace_size(b, q, vocab) + 5,), NAN)
    got = run(kernels.verify_sample, arguments, out, workspace)
    for f in FIELDS:
        assert torch.equal(getattr(got, f), getattr(want, f)), f
        whole = getattr(out, f)._base
        assert (whole == CANARY).sum() >= whole.numel() - getattr(out, f).numel(), f
    assert workspace[-5:].isnan().all()
    run(kernels.verify_sample, {n: t[:0] if isinstance(t, torch.Tensor) else t for n, t in arguments.items()},
        Verified(*(getattr(out, f)[:0] for f in FIELDS)))


def test_p33_rows_with_nan_and_infinities():
    logits = torch.randn(9, 1, 1030)
    logits[0] = -INF
    logits[1] = NAN
    logits[2, 0, 1025], logits[2, 0, 3] = INF, NAN
    logits[3, 0, [5, 1026]] = INF
    logits[4, 0, :1024] = -INF
    logits[5, 0, :1024] = NAN
    logits[6] = torch.where(torch.arange(1030) == 1029, 0.0, -1e30)
    logits[7, 0, 1027], logits[8, 0, 1028] = NAN, NAN
    logits[8, 0, 7:] = NAN
    temp = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    for more in ({}, {"top_k": torch.full((9,), 3).int(), "top_p": torch.full((9,), 0.9)}):
        got = assert_as_reference(problem(1030, b=9, q=1) | {"logits": logits, "temperature": temp} | more)
        assert got.bonus[[0, 1, 2, 6, 7]].tolist() == [0, 0, 1025, 1029, 1027]
    hot = {"logits": logits, "temperature": torch.where(temp > 0, INF, 0.0)}
    assert assert_as_reference(problem(1030, b=9, q=1) | hot).bonus[[0, 1, 2, 7]].tolist() == [0, 0, 1025, 1027]


@pytest.mark.parametrize("form,rule", [("one_hot", "token"), ("sparse", "token"), ("logits", "block")])
def test_limits_of_the_parameters_and_drafts_outside_of_the_vocabulary(form, rule):
    arguments = problem(40, form, rule, b=5, q=3, temperature=torch.tensor([1e-4, 1.0, 1.0, 1e4, 9.9e-6]),
                        top_k=int32(0, 1, 40, 39, 0), top_p=torch.tensor([1.0, 1.0, 0.0, 1e-7, 0.5]),
                        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0]))
    arguments["draft_ids"][:3, 1] = torch.tensor([-1, 40, 2**62])
    got = assert_as_reference(arguments)
    assert torch.equal(got.tokens[:, 0], arguments["logits"][:, 0].argmax(-1))


def test_everything_on_one_token_by_target_and_proposal():
    for form, rule in RULES[1:]:
        arguments = problem(33, form, rule, b=2, q=3)
        arguments["logits"][...] = torch.where(torch.arange(33) == 8, 90.0, -90.0)
        arguments["draft_ids"][:, 1:] = 8
        if form == "logits":
            arguments["draft_logits"] = arguments["logits"][:, :-1].clone()
        else:
            ids = torch.arange(33) if form == "dense" else arguments["draft_candidates"]
            if form == "sparse":
                ids[..., 0], ids[..., 1:] = 8, -1
            arguments["draft_probs"] = (ids == 8).float().expand(2, 2, -1)
        assert assert_as_reference(arguments).accept_lens.tolist() == [2, 2]


@triton.jit
def uniform_kernel(seeds, positions, starts, out, PURPOSE: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    for i in range(N):
        u = sample_distribution.uniform(tl.load(seeds + i), tl.load(positions + n), PURPOSE, tl.load(starts + i))
        tl.store(out + i * N + n, u)


@pytest.mark.parametrize("purpose", [reference.SAMPLE, reference.ACCEPT, reference.DRAFT])
def test_random_numbers_are_the_references(purpose):
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822, 12345, 2**32, 7])
    positions, starts = int32(0, 1, 2, 77, 2**31 - 1, 4096, 65536, 5), int32(0, 1, 2, 3, 2**31 - 2, 9, 10, 11)
    out = torch.empty(8, 8, dtype=torch.float64)
    uniform_kernel[1,](seeds, positions, starts, out, PURPOSE=purpose, N=8)
    assert torch.equal(out, reference.uniform(seeds, positions.expand(8, 8), purpose, starts[:, None]))


TEMPERATURE = 0.7


def draws(purpose):
    """u of the tokens at position 8 of three requests."""
    seeds = torch.arange(3) * 7919
    return reference.uniform(seeds, torch.full((3, 1), 8), purpose, torch.full((3, 1), 7))[:, 0]


@pytest.mark.parametrize("closer", [1 - 2e-6, 1 + 2e-6])
def test_a_draw_changes_within_rounding_of_where_it_should(closer):
    """u is a millionth from the boundary between two tokens that are 1,500 apart, with tiny ones around them."""
    share = reference.uniform(torch.arange(3) * 7919, torch.full((3, 1), 8), reference.SAMPLE)[:, 0] * closer
    logits = torch.full((3, 1, 3000), -60.0)
    logits[:, 0, 700], logits[:, 0, 2200] = (
        share.log().mul(TEMPERATURE).float(),
        (1 - share).log().mul(TEMPERATURE).float(),
    )
    arguments = problem(3000, q=1, temperature=torch.full((3,), TEMPERATURE)) | {
        "logits": logits, "context_lens": int32(7, 7, 7)}
    assert assert_as_reference(arguments).bonus.tolist() == [700 if closer > 1 else 2200] * 3


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("closer", [1 - 2e-6, 1 + 2e-6])
def test_acceptance_changes_within_rounding_of_where_it_should(closer, rule):
    """p is u times closer of a q that is nearly 1. Rule "block" accepts the only draft of a block by the same odds."""
    share = draws(reference.ACCEPT) * closer
    logits = torch.stack((share.log(), (1 - share).log(), torch.full((3,), -60.0)), 1).mul(TEMPERATURE).float()[:, None]
    arguments = problem(3, "sparse", rule, q=2, k=1, temperature=torch.full((3,), TEMPERATURE)) | {
        "context_lens": int32(7, 7, 7), "logits": logits.expand(3, 2, 3), "draft_ids": torch.zeros(3, 2).long(),
        "draft_candidates": torch.zeros(3, 1, 1).long(), "draft_probs": torch.ones(3, 1, 1)}
    assert assert_as_reference(arguments).accept_lens.tolist() == [int(closer > 1)] * 3


@pytest.mark.parametrize("closer", [1 - 2e-6, 1 + 2e-6])
@pytest.mark.parametrize("name,value", [("top_p", 0.7), ("min_p", 0.5)])
def test_a_cut_changes_within_rounding_of_where_it_should(name, value, closer):
    """The third of four likely tokens is kept or not, and a small u draws it if it is, as it comes first."""
    seeds = torch.arange(300)
    u = reference.uniform(seeds, torch.full((300, 1), 8), reference.SAMPLE)[:, 0]
    logits = torch.full((3, 1, 2000), -70.0)
    logits[:, 0, [1500, 900, 10, 1200]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log().mul(TEMPERATURE).float()
    share = value * (closer if name == "top_p" else 2 - closer)
    got = assert_as_reference(problem(2000, q=1, temperature=torch.full((3,), TEMPERATURE)) | {
        name: torch.full((3,), share), "logits": logits, "seeds": seeds[u < 0.2][:3], "context_lens": int32(7, 7, 7)})
    assert got.bonus.tolist() == [10 if closer > 1 else 900] * 3


@pytest.mark.parametrize("form", FORMS)
def test_a_request_alone_in_other_company_and_otherwise_shared_out(form, monkeypatch):
    arguments = problem(2100, form, "block", b=3, q=2, top_p=torch.tensor([0.9, 1.0, 0.8]))
    want, spaces = run(kernels.verify_sample, arguments), []
    for order in ([1], [2, 0]):
        some = {n: t[order] if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        got = run(kernels.verify_sample, some)
        for f in FIELDS:
            assert torch.equal(getattr(got, f), getattr(want, f)[order]), f
    for tiles in ((1, 1, 1), (4, 2, 4)):
        monkeypatch.setattr(kernels, "CONFIGS", kernels.CONFIGS | {
            name: (tile, 4) for name, tile in zip(("chunks", "rows", "residual"), tiles, strict=True)})
        spaces.append(torch.full((workspace_size(3, 2, 2100),), NAN))
        run(kernels.verify_sample, arguments, workspace=spaces[-1])
    assert same_bits(*spaces)


@pytest.mark.parametrize("form,rule", RULES[1:])
def test_a_residual_is_without_q_and_of_the_share_that_is_left(form, rule):
    """p = (0.3, 0.4, 0.3) and q = (0.6, 0.3, 0.1), drafts are 0. By rule "block" half of p is left after the first of
    them: then only token 2 has more of p than of q."""
    p, q = torch.tensor([0.3, 0.4, 0.3]), torch.tensor([0.6, 0.3, 0.1])
    arguments = problem(3, form, rule, b=16, q=3, k=3, temperature=torch.ones(16)) | {
        "logits": p.log().expand(16, 3, 3), "draft_ids": torch.zeros(16, 3).long()}
    if form == "sparse":
        arguments["draft_candidates"] = torch.arange(3).expand(16, 2, 3)
    arguments["draft_logits" if form == "logits" else "draft_probs"] = (
        q.log() if form == "logits" else q).expand(16, 2, 3)
    got = assert_as_reference(arguments)
    assert {0, 2} <= set(got.accept_lens.tolist())
    assert (got.bonus[got.accept_lens < 2] > 0).all()
    if rule == "block":
        assert (got.bonus[got.accept_lens == 1] == 2).all()


@pytest.mark.parametrize("rule", ["token", "block"])
def test_first_tokens_follow_the_target(rule):
    """150 requests draw their only draft from a q of four tokens, and one token more from a p of eight."""
    b, target = 150, torch.tensor([1.0, 0.5, 0.0, -0.3, 0.8, -1.0, 0.2, -0.6])
    values, ids = torch.tensor([1.2, 0.6, 0.1, -0.5]).expand(b, 1, 4), torch.tensor([6, 0, 3, 1]).expand(b, 1, 4)
    arguments = problem(8, "sparse", rule, b=b, q=2, temperature=torch.ones(b))
    arguments |= {"logits": target.expand(b, 2, 8), "draft_candidates": ids.contiguous()}
    drafts, probs = torch.empty(b, 1, dtype=torch.int64), torch.empty(b, 1, 4)
    reference.sample_draft(values.contiguous(), ids.contiguous(), arguments["context_lens"], arguments["temperature"],
                           arguments["seeds"], None, None, None, drafts, probs)
    arguments["draft_ids"][:, 1:], arguments["draft_probs"] = drafts, probs
    got = assert_as_reference(arguments)
    found = chi_square(got.tokens[:, 0].bincount(minlength=8), torch.softmax(target, -1) * b)
    assert found > 1e-4 and 0.3 < got.accept_lens.float().mean() < 0.9, found


@pytest.mark.parametrize("k", [1, 6, 16, 33])
def test_drafts_match_reference(k):
    torch.manual_seed(k)
    values, ids = torch.randn(5, 2, k).sort(-1, descending=True).values, torch.randint(0, 2**40, (5, 2, k))
    values[:, 1] = values[:, 1].round()  # equal ones
    temp, filters = torch.tensor([0.0, 1.0, 0.8, 1.2, 1.5]), list(FILTERS.values())
    for some in ([None] * 3, filters):
        results = []
        for function in (kernels.sample_draft, reference.sample_draft):
            out, probs = torch.full((5, 4), CANARY)[:, 1:-1], torch.empty(5, 2, k)
            function(values, ids, int32(3, 4, 5, 6, 7), temp, torch.arange(5) * 31, *some, out, probs)
            assert (out._base[:, [0, -1]] == CANARY).all()
            results.append((out, probs))
        (got, probs), (want, like) = results
        assert torch.equal(got, want)
        assert_within_budget(probs, like)


def test_drafts_of_slots_with_nothing_to_draw():
    values = torch.tensor([[[-INF, -INF]], [[NAN, -INF]], [[INF, 1.0]], [[NAN, 0.0]], [[NAN, 1.0]]])
    ids, temp = torch.tensor([[[4, 5]]]).expand(5, 1, 2).contiguous(), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    out, probs = torch.empty(5, 1, dtype=torch.int64), torch.empty(5, 1, 2)
    kernels.sample_draft(values, ids, int32(0, 0, 0, 0, 0), temp, torch.arange(5), None, None, None, out, probs)
    assert out[:, 0].tolist() == [4, 4, 4, 5, 4]
    assert torch.equal(probs[:, 0, 0], torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))
