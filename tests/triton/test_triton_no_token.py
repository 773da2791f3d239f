"""Drafts that are no token, in Triton's interpreter; what they mean is in test_no_token.py."""

import pytest
import torch

from dflash_kernels._triton import sample as kernels
from tests.kernels.test_no_token import RULES, four_tokens, no_tokens
from tests.kernels.test_verify import assert_same
from tests.kernels.test_verify import from_reference as greedy_from_reference
from tests.support.op_samples import int32
from tests.support.sampling_distribution import chi_square
from tests.triton.test_triton_sample import FIELDS, NAN, assert_as_reference, problem, run
from tests.triton.test_triton_verify import run as greedy


@pytest.mark.parametrize("kind,rule", RULES)
def test_it_is_as_if_the_block_were_shorter(kind, rule):
    """Whatever stands behind: real ids, and proposals that are poison."""
    b, ends, ids = 4, torch.tensor([1, 2, 2, 1]), no_tokens(1100)
    arguments = problem(1100, kind, rule, b=b, q=3, temperature=torch.tensor([0.9, 0.9, 1.2, 0.0]))
    want = run(kernels.verify_sample, arguments | {"block_lens": ends.int()})
    arguments["draft_ids"][torch.arange(b), ends] = ids[:b]
    for name in ("draft_probs", "draft_logits"):
        for row, end in enumerate(ends.tolist() if arguments[name] is not None else ()):
            arguments[name][row, end:] = NAN
    got = run(kernels.verify_sample, arguments | {"block_lens": int32(3, 9, 3, 2)})
    for f in FIELDS:
        assert torch.equal(getattr(got, f), getattr(want, f)), f
    assert kind not in ("dense", "logits") or want.accept_lens.max() > 0


def test_a_draft_of_minus_one_leaves_p_and_no_residual():
    b = 40
    torch.manual_seed(1)
    p, logits, drafts, given = four_tokens("dense", b, 1)
    drafts[::2], drafts[1::2] = -1, 4
    got = assert_as_reference(problem(4, "dense", "block", b=b, q=2, temperature=torch.ones(b)) | {
        "logits": logits.contiguous(), "draft_ids": torch.cat([torch.zeros(b, 1).long(), drafts], 1),
        "draft_probs": given.probs})
    found = chi_square(got.tokens[:, 0].bincount(minlength=4), p * b)
    assert found > 1e-3, found


def test_a_greedy_draft_of_minus_one_is_not_accepted_where_the_target_has_minus_one():
    draft = torch.tensor([[7, -1, 5, 6], [7, 4, -1, 6], [7, 4, 5, -1], [7, -9, 5, 6]])
    target = torch.tensor([[-1, 5, 6, 1], [4, -1, 6, 1], [4, 5, -1, 1], [-9, 5, 6, 1]])
    for widths in (None, int32(4, 3, 4, 0)):
        assert_same(greedy(draft, target, int32(0, 1, 2, 3), None, widths),
                    greedy_from_reference(draft, target, int32(0, 1, 2, 3), None, widths))
    assert greedy(draft, target, int32(0, 1, 2, 3)).accept_lens.tolist() == [0, 1, 2, 0]
