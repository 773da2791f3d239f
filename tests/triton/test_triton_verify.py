import pytest
import torch

from dflash_kernels import Verified
from dflash_kernels._triton.verify import CONFIGS, _parts, verify_greedy
from tests.kernels.test_verify import (
    FIELDS,
    INF,
    NAN,
    assert_same,
    drafts_that_agree,
    from_reference,
    int32,
    logits_for,
)
from tests.support.op_samples import boxed, verified

TILE = CONFIGS["logits"][0]


@pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
def dtype(request):
    return request.param


def run(draft, target, lens, logits=None, block_lens=None, out=None):
    out = verified(*draft.shape) if out is None else out
    assert verify_greedy(draft, target, logits, lens, block_lens, *(getattr(out, f) for f in FIELDS)) is None
    return Verified(*(getattr(out, f).contiguous() for f in FIELDS))


@pytest.mark.parametrize("q", [1, 3, 8, 11])
def test_matches_reference_from_ids_and_from_logits(dtype, q):
    target = torch.randint(0, 30, (5, q))
    draft, lens = drafts_that_agree(target, [0, 1, 2, 7, 20]), int32(3, 0, 9, 1, 2**30)
    logits = logits_for(target, 31, dtype)
    for widths in (None, int32(q, 0, max(q - 1, 1), 2**31 - 1, -9)):
        want = from_reference(draft, target, lens, None, widths)
        assert_same(run(draft, target, lens, None, widths), want)
        assert_same(run(draft, None, lens, logits, widths), want)


@pytest.mark.parametrize("vocab", [1, 5, TILE - 1, TILE + 1, 2 * TILE + 3])
def test_p33_nan_ties_and_infinities_as_in_torch_argmax(dtype, vocab):
    logits = torch.randint(-3, 3, (7, 2, vocab)).to(dtype)
    logits[0] = -INF
    logits[1] = torch.where(torch.arange(vocab) % 2 == 0, -0.0, 0.0)
    logits[2, :, vocab // 2:] = NAN
    logits[3, 0, -1], logits[3, 1, 0] = NAN, NAN
    logits[4, :, -1] = INF
    logits[5, :, -1] = -torch.tensor(NAN)
    want = logits.argmax(-1)
    draft = torch.cat([torch.zeros(7, 1, dtype=torch.int64), want[:, :-1]], 1)
    got = run(draft, None, torch.zeros(7, dtype=torch.int32), logits)
    assert torch.equal(got.tokens, want)


def test_rows_are_cut_into_parts_that_cover_them():
    for rows, vocab in ((1, 1), (1, 151936), (8, 248320), (2048, 151936), (16, 4097)):
        part, parts = _parts(rows, vocab)
        assert part % TILE == 0 and (parts - 1) * part < vocab <= parts * part


def test_p32_rows_and_tails_that_cannot_matter_are_poison(dtype):
    target = torch.randint(0, 30, (3, 5))
    draft, lens, widths = drafts_that_agree(target, [4, 4, 4]), int32(7, 8, 9), int32(2, 0, 5)
    wide = torch.full((3, 9, 50), NAN, dtype=dtype)
    wide[..., 40:] = INF
    wide[:, 1:6, 9:40] = logits_for(target, 31, dtype)
    clean = from_reference(draft, target, lens, None, widths)
    for b, w in enumerate(widths.tolist()):
        wide[b, 1 + w:], draft[b, w:], target[b, w:] = NAN, 2**62, -(2**62)
    assert_same(run(draft, None, lens, wide[:, 1:6, 9:40], widths), clean)
    assert_same(run(draft, target, lens, None, widths), clean)


def test_outputs_inside_canaries_and_on_top_of_inputs():
    target = torch.randint(0, 30, (3, 4))
    draft, lens = drafts_that_agree(target, [0, 3, 1]), int32(1, 2, 3)
    want, out = from_reference(draft, target, lens), verified(3, 4)
    run(draft, target, lens, out=out)
    for f in FIELDS:
        whole = getattr(out, f)._base
        assert (whole == 77).sum() >= whole.numel() - getattr(out, f).numel(), f
    on_top = Verified(out.accept_lens, out.commit_lens, target, boxed(3, dtype=torch.int64), lens)
    assert_same(run(draft, target, lens, out=on_top), want)
    verify_greedy(draft[:0], target[:0], None, lens[:0], None, *(getattr(out, f)[:0] for f in FIELDS))
