"""Emitted tokens follow the target's distribution: chi-square tests of whole batches of requests, which wrong rules
fail.

All seeds are fixed, so a p-value is the same in every run of the same kernel. With some 200 of them, one below 1e-6
comes up by chance once in 5,000 changes of the kernel or of a seed.
"""

import dataclasses

import pytest
import torch

from dflash_kernels import LogitAdjustments, Proposal, SamplingTensors, reference, verify_sample
from tests.support import sampling_distribution as chain
from tests.support.sample_margin import from_reference
from tests.support.sampling_distribution import FILTERS, PROPOSALS

distribution = reference.sample
REQUESTS = 100_000
SMALLEST = 1e-6
GREEDY_EVERY, TEMPERATURE = 50, 0.8


def sampled(kind, rule, filters, requests=REQUESTS, seed=0, verify=verify_sample, made=None):
    """p-values of the text. made: a target's table and a drafter's logits instead of random ones."""
    table, head = chain.chain(seed) if made is None else made
    params = chain.params(requests, TEMPERATURE, FILTERS[filters], GREEDY_EVERY, seed)
    text, _ = chain.decode(table, head, kind, rule, params, verify=verify)
    if verify is verify_sample:
        assert (text[params.temperature == 0] == torch.tensor(chain.greedy_text(table))).all()
    return chain.p_values(table, text, params)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", PROPOSALS)
def test_p28_text_follows_the_target_s_distribution(kind, rule, filters):
    """Greedy requests among them; sparse drafts are drawn from the renormalised most likely, which are q."""
    found = sampled(kind, rule, filters)
    chain.SEEN.extend(found.values())
    assert min(found.values()) > SMALLEST, found


@pytest.mark.parametrize("filters", ["baseline", "all"])
def test_text_follows_the_distribution_under_every_instruction_set(vector_isa, filters):
    for kind, rule in (("one_hot", "token"), ("dense", "block")):
        found = sampled(kind, rule, filters, requests=20_000, seed=3)
        chain.SEEN.extend(found.values())
        assert min(found.values()) > SMALLEST, found


def test_text_follows_the_adjusted_distribution():
    """A bitmask, a penalty and a bias, the same for all rows, against the chain of adjusted logits."""
    table, head = chain.chain(4)
    params = chain.params(REQUESTS, 1.0, {}, seed=4)
    bias = torch.randn(chain.V)
    adjust = [torch.tensor([0x0F0F00FF], dtype=torch.int32), torch.tensor([1.4]), bias, torch.tensor([0x7FFFBFF7])]
    words = [t.int().expand(REQUESTS, chain.WIDTH, 1) for t in (adjust[0], adjust[3])]
    changes = LogitAdjustments(words[0], adjust[1].expand(REQUESTS).contiguous(),
                               bias.expand(REQUESTS, chain.WIDTH, -1), words[1])
    text, _ = chain.decode(table, head, "sparse", "block", params, adjustments=changes)
    rows = distribution.adjusted(table[None], adjust[0].int().expand(1, chain.V, 1), adjust[1], bias,
                        adjust[3].int().expand(1, chain.V, 1))[0]
    found = chain.p_values(rows, text, params)
    chain.SEEN.extend(found.values())
    assert min(found.values()) > SMALLEST, found


# ---- wrong rules, which must fail ----------------------------------------------------------------------------------

def with_proposal(change):
    """The op with its proposal changed behind its back: q is not what the drafts were drawn from."""
    def verify(draft, logits, lens, params, *, proposal=None, **more):
        return verify_sample(draft, logits, lens, params, proposal=change(proposal), **more)
    return verify


def with_params(change):
    def verify(draft, logits, lens, params, **more):
        return verify_sample(draft, logits, lens, change(params), **more)
    return verify


def reference_with(**functions):
    """The reference with one of its functions replaced."""
    def verify(draft, logits, lens, params, *, proposal=None, adjustments=None, rule="token", block_lens=None):
        with pytest.MonkeyPatch.context() as patch:
            for name, function in functions.items():
                patch.setattr(distribution, name, function)
            return from_reference(draft, logits, lens, params, proposal, adjustments, rule, block_lens)
    return verify


def accepts_with_q(px, qx, u, live):
    accept = ((u < qx) & live).long().cumprod(1).sum(1)
    return accept, torch.ones_like(accept, dtype=torch.float64)


def nothing_subtracted(draft, vocab, probs, candidates, logits, temperature, real=distribution.proposal):
    """q where the drafts are, which acceptance looks at, and 0 elsewhere: the residual is p less its draft."""
    q = real(draft, vocab, probs, candidates, logits, temperature)
    return torch.zeros_like(q).scatter_(-1, draft[:, 1:, None], q.gather(-1, draft[:, 1:, None]))


def token_s_residual(*arguments, real=distribution._by_block):
    accept, share = real(*arguments)
    return accept, torch.ones_like(share)


def three_tokens():
    """A chain where the share of the mass that an accepted draft leaves decides what its residual is: half of (0.6,
    0.3, 0.1) over a q of (0.01, 0.15, 0.84) is all on the first token, the whole of it is not."""
    table, head = torch.full((chain.V, chain.V), 1e-30), torch.full((chain.WIDTH - 1, chain.V), 1e-30)
    table[:, :3], table[chain.ANCHOR, :3] = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.4, 0.3, 0.3])
    head[:, :3], head[0, :3] = torch.tensor([0.01, 0.15, 0.84]), torch.tensor([0.8, 0.1, 0.1])
    return table.log() * TEMPERATURE, head.log() * TEMPERATURE


@pytest.mark.parametrize("rule", ["token", "block"])
def test_text_of_three_tokens_follows_the_distribution(rule):
    found = sampled("dense", rule, "baseline", made=three_tokens())
    chain.SEEN.extend(found.values())
    assert min(found.values()) > SMALLEST, found


WRONG = {
    "accepts with q instead of p / q": ("dense", "token", reference_with(_by_token=accepts_with_q)),
    "the residual's q is not subtracted": ("dense", "token", reference_with(proposal=nothing_subtracted)),
    "the residual is not renormalised": ("dense", "token", reference_with(
        draw=lambda weights, u, real=distribution.draw: real(torch.cat((weights[..., :-1], 1 - weights[..., :-1].sum(
            -1, keepdim=True)), -1), u))),
    "the temperature is applied twice": ("one_hot", "token", with_params(
        lambda p: dataclasses.replace(p, temperature=p.temperature**2))),
    "the block rule with the token rule's residual": ("dense", "block", reference_with(_by_block=token_s_residual)),
    "p25: q is a softmax where drafts are greedy": ("one_hot", "token", lambda *a, proposal=None, **more: verify_sample(
        *a, proposal=Proposal(logits=chain.chain()[1].expand(a[0].shape[0], -1, -1)), **more)),
    "p28: q is the whole distribution where drafts came from its most likely": ("sparse", "token", with_proposal(
        lambda q: Proposal(logits=chain.chain()[1].expand(len(q.ids), -1, -1)))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rule_fails(wrong):
    kind, rule, verify = WRONG[wrong]
    found = sampled(kind, rule, "baseline", requests=15_000, verify=verify,
                    made=three_tokens() if rule == "block" else None)
    assert min(found.values()) < SMALLEST, (wrong, found)


# ---- acceptance ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", PROPOSALS)
def test_the_block_rule_accepts_at_least_as_many(kind):
    requests, slots = 20_000, 7
    draw = torch.Generator().manual_seed(7)
    target, head = (torch.randn(1, slots + 1, chain.V, generator=draw) * 1.5 for _ in range(2))
    head = (target + head * 0.5)[:, :-1]
    params, lens = SamplingTensors(torch.ones(requests), torch.arange(requests)), torch.full((requests,), 5).int()
    mean = {}
    for rule in ("token", "block"):
        drafts, proposal = chain.drafts(kind, params, lens, head[0])
        block = torch.cat((torch.zeros(requests, 1, dtype=torch.int64), drafts), 1)
        got = verify_sample(block, target.expand(requests, -1, -1), lens, params, proposal=proposal, rule=rule)
        mean[rule] = got.accept_lens.double()
    gain = mean["block"] - mean["token"]
    error = gain.std().item() / requests**0.5
    chain.NOTES.append(f"accepted of {slots} {kind} drafts: token {mean['token'].mean():.3f}, block "
                       f"{mean['block'].mean():.3f} (gain {gain.mean():.3f} +- {error:.3f})")
    assert (gain == 0).all() if kind == "one_hot" else gain.mean() > (-3 if kind == "sparse" else 5) * error
