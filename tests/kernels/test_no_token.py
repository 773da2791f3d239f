"""Drafts that are no token, such as the -1 of an engine that proposes nothing: a block ends at the first of them.

What is emitted there follows p, as after a block that was accepted whole, and what stands behind counts for nothing.
"""

import pytest
import torch

from dflash_kernels import Proposal, SamplingTensors, verify_greedy, verify_sample
from tests.kernels.test_sample_distribution import SMALLEST, sampled
from tests.kernels.test_verify import assert_same
from tests.kernels.test_verify import from_reference as greedy_from_reference
from tests.support import sampling_distribution as chain
from tests.support.sample_inputs import block as block_of
from tests.support.sample_inputs import int32, params, proposal, same, some_params
from tests.support.sample_margin import agree, from_reference
from tests.support.sampling_distribution import PROPOSALS

RULES = [(kind, rule) for kind in PROPOSALS for rule in ("token", "block") if kind != "one_hot" or rule == "token"]
NAN = float("nan")


def no_tokens(vocab):
    return torch.tensor([-1, vocab, 2**31, 2**62, -(2**31) - 1, -(2**63), 2**32])


def with_holes(verify):
    """The op on blocks of which three in four have an id that is no token, each place in turn, real ids behind."""
    def run(draft, logits, lens, params, **more):
        draft, ids, n = draft.clone(), no_tokens(logits.shape[-1]), torch.arange(len(draft))
        places = (n // len(ids)) % (draft.shape[1])  # 0: none
        draft[n[places > 0], places[places > 0]] = ids[n % len(ids)][places > 0]
        return verify(draft, logits, lens, params, **more)
    return run


def reference_op(draft, logits, lens, params, *, proposal=None, adjustments=None, rule="token", block_lens=None):
    return from_reference(draft, logits, lens, params, proposal, adjustments, rule, block_lens)


@pytest.mark.parametrize("verify,requests", [(verify_sample, 30_000), (reference_op, 8_000)],
                         ids=["kernel", "reference"])
@pytest.mark.parametrize("kind,rule", RULES)
def test_text_follows_the_distribution_where_blocks_have_ids_that_are_no_token(kind, rule, verify, requests):
    found = sampled(kind, rule, "all", requests, seed=11, verify=with_holes(verify))
    chain.SEEN.extend(found.values())
    assert min(found.values()) > SMALLEST, found


@pytest.mark.parametrize("kind,rule", [("dense", "token"), ("sparse", "block"), ("logits", "block")])
def test_text_follows_the_distribution_under_every_instruction_set(vector_isa, kind, rule):
    found = sampled(kind, rule, "baseline", requests=15_000, seed=12, verify=with_holes(verify_sample))
    chain.SEEN.extend(found.values())
    assert min(found.values()) > SMALLEST, found


def four_tokens(kind, b, slots):
    """p = (.1, .2, .3, .4), and drafts of q = (.4, .3, .2, .1)."""
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    drafts = torch.multinomial(q, b * slots, replacement=True).view(b, slots)
    shares = q.expand(b, slots, 4)
    given = {"one_hot": None, "dense": Proposal(probs=shares), "logits": Proposal(logits=shares.log()),
             "sparse": Proposal(probs=shares, ids=torch.arange(4).expand(b, slots, 4))}[kind]
    return p, p.log().expand(b, slots + 1, 4), drafts, given


@pytest.mark.parametrize("verify", [verify_sample, reference_op], ids=["kernel", "reference"])
@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("kind,rule", RULES)
def test_a_draft_of_minus_one_leaves_p_and_no_residual(kind, rule, place, verify):
    """It left (p - q)+, all on the last two tokens; by rule "block" one at the end also biased what is before it."""
    b = 20_000
    for n, hole in enumerate((-1, 4)):
        p, logits, drafts, given = four_tokens(kind, b, 3)
        drafts[:, place - 1] = hole
        anchored, lens = torch.cat([torch.zeros(b, 1).long(), drafts], 1), torch.full((b,), 9 * n).int()
        got = verify(anchored, logits, lens, SamplingTensors(torch.ones(b), torch.arange(b) * 31), proposal=given,
                     rule=rule)
        whole = got.commit_lens == place
        assert whole.any() and int(got.commit_lens.max()) == place
        for some in (got.tokens[:, 0], got.bonus[whole]):
            found = chain.chi_square(some.bincount(minlength=4), p * len(some))
            assert found > SMALLEST, (hole, found)


@pytest.mark.parametrize("kind,rule", RULES)
def test_it_is_as_if_the_block_were_shorter(vector_isa, dtype, kind, rule):
    """Whatever stands behind, real ids and proposals, and whatever is proposed there, poison too."""
    logits, lens = (torch.randn(14, 5, 1100) * 2).to(dtype), torch.arange(14).int()
    draft, given, p = block_of(logits), proposal(kind, logits), some_params(14, "baseline", greedy_every=5)
    widths = int32(5, 4, 3, 5, 2, 0, 1, 5, 4, 3, 5, -3, 9, 2)
    ends = torch.arange(14) % 4 + 1
    ended, ids = torch.minimum(widths, ends.int()), no_tokens(1100)
    want = verify_sample(draft, logits, lens, p, proposal=given, rule=rule, block_lens=ended)
    draft[torch.arange(14), ends] = ids[torch.arange(14) % len(ids)]
    same(verify_sample(draft, logits, lens, p, proposal=given, rule=rule, block_lens=widths), want)
    for b, end in enumerate(ends.tolist()):
        for t in vars(given).values() if given else ():
            if t is not None and t.is_floating_point():
                t[b, end - 1:] = NAN
    same(verify_sample(draft, logits, lens, p, proposal=given, rule=rule, block_lens=widths), want)
    assert want.accept_lens.max() > 0


@pytest.mark.parametrize("kind,rule", RULES)
def test_ids_of_all_kinds_agree_with_the_reference(vector_isa, kind, rule):
    logits = torch.randn(60, 4, 700) * 2
    draft, ids = block_of(logits), no_tokens(700)
    draft = torch.where(torch.rand(60, 4) < 0.3, ids[torch.randint(0, len(ids), (60, 4))], draft)
    agree(draft, logits, torch.arange(60).int(), params(60), proposal(kind, logits), rule=rule)


# ---- greedy --------------------------------------------------------------------------------------------------------

def test_a_greedy_draft_of_minus_one_is_not_accepted_where_the_target_has_minus_one(isa):
    draft = torch.tensor([[7, -1, 5, 6], [7, 4, -1, 6], [7, 4, 5, -1], [7, -9, 5, 6]])
    target = torch.tensor([[-1, 5, 6, 1], [4, -1, 6, 1], [4, 5, -1, 1], [-9, 5, 6, 1]])
    got = verify_greedy(draft, target, int32(0, 1, 2, 3))
    assert got.accept_lens.tolist() == [0, 1, 2, 0] and got.bonus.tolist() == [-1, -1, -1, -9]
    assert_same(got, greedy_from_reference(draft, target, int32(0, 1, 2, 3)))


def test_a_greedy_block_ends_at_an_id_that_is_no_token(isa, dtype):
    logits = torch.randn(21, 4, 90).to(dtype)
    target, lens = logits.argmax(-1), torch.arange(21).int()
    draft = torch.cat([torch.zeros(21, 1).long(), target[:, :-1]], 1)
    ends = torch.arange(21) % 3 + 1
    draft[torch.arange(21), ends] = no_tokens(90).repeat(3)
    want = verify_greedy(draft, None, lens, logits=logits, block_lens=ends.int())
    assert want.commit_lens.tolist() == ends.tolist()
    assert_same(verify_greedy(draft, None, lens, logits=logits), want)
    assert_same(verify_greedy(draft, target, lens), want)
    assert_same(greedy_from_reference(draft, None, lens, logits), want)
    same(verify_sample(draft, logits, lens, params(21, 0.0)), want)
