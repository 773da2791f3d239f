"""Sampled verification beside SGLang's and vLLM's own Triton kernels, on the same random inputs in the interpreter."""

import pytest
import torch

from bench.peers import gpu_peers
from dflash_kernels._triton import sample, verify
from dflash_kernels.reference import sample as reference
from tests.support.sampling_distribution import chi_square
from tests.triton.test_triton_sample import problem, run


def engine(name, path):
    try:
        return gpu_peers.load(name, path)
    except gpu_peers.Absent as why:
        pytest.skip(str(why))


def greedy_problem(vocab=300, b=6, q=5):
    """Drafts that agree with the target for 0 ... q - 1 tokens."""
    torch.manual_seed(0)
    arguments = problem(vocab, b=b, q=q, temperature=torch.zeros(b))
    target = arguments["logits"].argmax(-1)
    agreeing = torch.arange(1, q) <= torch.tensor([0, 1, 2, 3, 4, 2])[:, None]
    arguments["draft_ids"][:, 1:] = torch.where(agreeing, target[:, :-1], (target[:, :-1] + 1) % vocab)
    return arguments, target


def ours(arguments):
    return run(sample.verify_sample, arguments)


def test_greedy_requests_get_what_sglang_gives_them():
    theirs = engine("sglang", "kernels/ops/speculative/dflash.py")
    arguments, target = greedy_problem()
    (b, q), lens = target.shape, arguments["context_lens"]
    accept, commit, new_lens = (torch.empty(b, dtype=torch.int32) for _ in range(3))
    bonus, tokens = torch.empty(b, dtype=torch.int64), torch.empty(b, q, dtype=torch.int64)
    theirs._compute_dflash_accept_bonus_triton_unchecked(
        arguments["draft_ids"].contiguous(), target, accept, commit, bonus, tokens, lens, new_lens)
    got = ours(arguments)
    assert got.accept_lens.tolist() == [0, 1, 2, 3, 4, 2]
    for mine, other in ((got.accept_lens, accept), (got.commit_lens, commit), (got.bonus, bonus),
                        (got.new_lens, new_lens)):
        assert mine.tolist() == other.tolist()
    committed = torch.arange(q) < commit[:, None]
    assert torch.equal(got.tokens[committed], tokens[committed])


def test_greedy_requests_get_what_verify_greedy_gives_them():
    arguments, target = greedy_problem()
    got = ours(arguments)
    other = [torch.empty_like(t) for t in (got.accept_lens, got.commit_lens, got.tokens, got.bonus, got.new_lens)]
    verify.verify_greedy(arguments["draft_ids"], target, None, arguments["context_lens"], None, *other)
    for mine, like in zip((got.accept_lens, got.commit_lens, got.tokens, got.bonus, got.new_lens), other, strict=True):
        assert torch.equal(mine, like)


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9}], ids=["plain", "filtered"])
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("form", ["one_hot", "sparse", "dense"])
def test_sampled_requests_get_what_sglang_gives_them_for_the_same_coins(form, rule, filters):
    """SGLang takes its random numbers as tensors: given ours, it must accept as many and draw the same tokens. Its
    one-hot q is a proposal of one candidate: p's share is its acceptance."""
    theirs = engine("sglang", "kernels/ops/speculative/reject_sampling.py")
    b, q, vocab = 12, 4, 50
    filters = {n: torch.full((b,), x, dtype=torch.int32 if n == "top_k" else torch.float32) for n, x in filters.items()}
    arguments = problem(vocab, form, rule, b=b, q=q, temperature=torch.full((b,), 0.5), **filters)
    drafts, lens, seeds = arguments["draft_ids"], arguments["context_lens"], arguments["seeds"]
    if form == "one_hot":
        arguments |= {"draft_candidates": drafts[:, 1:, None].clone(), "draft_probs": torch.ones(b, q - 1, 1)}
    got, starts = ours(arguments), lens[:, None].long()
    p = reference.distribution(arguments["logits"], arguments["temperature"], **filters)
    proposed = reference.proposal(drafts, vocab, arguments["draft_probs"], arguments["draft_candidates"], None, None)
    positions = starts + 1 + torch.arange(q)
    coins = reference.uniform(seeds, positions, reference.ACCEPT, starts)
    final = reference.uniform(seeds, positions, reference.SAMPLE).gather(1, got.accept_lens[:, None].long())[:, 0]
    index, accepted = torch.arange(b * q, dtype=torch.int32).view(b, q), torch.empty(b, dtype=torch.int32)
    tokens = torch.full((b * q,), -1, dtype=torch.int32)
    theirs.chain_speculative_sampling_triton(
        tokens, torch.full((b, q), -1, dtype=torch.int32), accepted, drafts, index, None, None, coins.float(),
        final.float(), p.float(), proposed.float(), 1.0, 1.0, True, block_verification=rule == "block")
    assert torch.equal(got.accept_lens, accepted) and len(accepted.unique()) > 1
    assert torch.equal(got.tokens, tokens.view(b, q).long())


def by_vllm(arguments):
    """(tokens, how many) of vLLM's rejection_sample."""
    theirs = engine("vllm", "v1/worker/gpu/spec_decode/rejection_sampler_utils.py")
    b, q, vocab = arguments["logits"].shape
    starts = arguments["context_lens"].long()[:, None]
    request = torch.arange(b, dtype=torch.int32)
    return theirs.rejection_sample(
        arguments["logits"].reshape(b * q, vocab).contiguous(), None, arguments["draft_ids"].flatten(),
        torch.arange(0, b * q + 1, q, dtype=torch.int32), (starts + torch.arange(q)).flatten(), request,
        request.repeat_interleave(q), torch.arange(q, dtype=torch.int32).repeat(b), arguments["temperature"],
        arguments["seeds"], q - 1)


def test_greedy_requests_get_what_vllm_gives_them():
    arguments, _ = greedy_problem()
    tokens, count = by_vllm(arguments)
    got = ours(arguments)
    assert torch.equal(got.commit_lens, count)
    committed = torch.arange(tokens.shape[1]) < count[:, None]
    assert torch.equal(got.tokens[committed], tokens[committed])


def test_sampled_requests_with_one_hot_drafts_follow_the_distribution_that_vllms_do():
    """vLLM's random numbers are its own, so both are held against the target: first tokens, and how many drafts pass,
    which is p of the draft for either rule. Every fifth request is greedy."""
    b, temp, target = 250, torch.ones(250), torch.tensor([1.0, 0.5, 0.0, -0.3, 0.8, -1.0, 0.2, -0.6])
    temp[::5] = 0.0
    arguments = problem(8, b=b, q=2, temperature=temp) | {"logits": target.expand(b, 2, 8)}
    arguments["draft_ids"][:, 1] = 4
    distribution, sampled, n = torch.softmax(target, -1), temp > 0, int((temp > 0).sum())
    for tokens, count in (by_vllm(arguments), (ours(arguments).tokens, ours(arguments).commit_lens)):
        assert chi_square(tokens[sampled, 0].bincount(minlength=8), distribution * n) > 1e-4
        passed, share = int((count[sampled] == 2).sum()), distribution[4].item()
        assert abs(passed - share * n) < 4 * (n * share * (1 - share)) ** 0.5
        assert (tokens[~sampled, 0] == 0).all() and (count[~sampled] == 1).all()
