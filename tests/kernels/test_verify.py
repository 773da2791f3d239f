import pytest
import torch

from dflash_kernels import StepGraph, Verified, prepare_block, reference, verify_greedy
from dflash_kernels.testing import same_bits

FIELDS = ("accept_lens", "commit_lens", "tokens", "bonus", "new_lens")
NAN, INF = float("nan"), float("inf")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def empty_like_result(b, q):
    ints = [torch.full((b,), -7, dtype=torch.int32) for _ in range(3)]
    return Verified(ints[0], ints[1], torch.full((b, q), -7), torch.full((b,), -7), ints[2])


def from_reference(draft, target, lens, logits=None, block_lens=None):
    out = empty_like_result(*draft.shape)
    reference.verify.verify_greedy(draft, target, logits, lens, block_lens, *(getattr(out, f) for f in FIELDS))
    return out


def assert_same(got, want):
    for f in FIELDS:
        assert same_bits(getattr(got, f), getattr(want, f)), (f, getattr(got, f), getattr(want, f))


def drafts_that_agree(target, agree):
    """Draft blocks whose first agree[b] tokens after the anchor are what the target says, and the next one is not."""
    draft = torch.cat([torch.full_like(target[:, :1], 3), target[:, :-1]], 1)
    for b, n in enumerate(agree):
        if n + 1 < draft.shape[1]:
            draft[b, n + 1] += 1
    return draft


def logits_for(target, vocab, dtype):
    """Random logits whose argmax is `target`."""
    logits = torch.randn(*target.shape, vocab).to(dtype)
    return logits.scatter_(2, target[..., None], 100.0)


@pytest.mark.parametrize("q", [1, 2, 3, 8, 16])
def test_every_accept_length_against_a_plain_loop(isa, q):
    b = q + 3
    target = torch.randint(0, 50, (b, q))
    draft = drafts_that_agree(target, range(b))
    widths = torch.randint(0, q + 1, (b,)).to(torch.int32)
    widths[0], widths[-1] = 0, q
    lens = torch.randint(0, 1000, (b,)).to(torch.int32)
    got = verify_greedy(draft, target, lens, block_lens=widths)
    for r in range(b):
        n, w = 0, int(widths[r])
        while n + 1 < w and draft[r, n + 1] == target[r, n]:
            n += 1
        commit = n + 1 if w else 0
        assert got.accept_lens[r] == (n if w else 0) and got.commit_lens[r] == commit
        assert got.tokens[r].tolist() == target[r, :commit].tolist() + [-1] * (q - commit)
        assert got.bonus[r] == (target[r, n] if w else -1) and got.new_lens[r] == lens[r] + commit
    assert_same(got, from_reference(draft, target, lens, block_lens=widths))


@pytest.mark.parametrize("b,q,vocab", [(0, 4, 9), (1, 1, 1), (1, 8, 1000), (4, 5, 257), (2, 16, 515), (1, 2, 40000)])
def test_logits_give_the_same_as_their_argmax(isa, dtype, b, q, vocab):
    target = torch.randint(0, vocab, (b, q))
    draft = drafts_that_agree(target, torch.randint(0, q + 1, (b,)).tolist())
    lens = torch.arange(b, dtype=torch.int32)
    logits = logits_for(target, vocab, dtype)
    got = verify_greedy(draft, None, lens, logits=logits)
    assert_same(got, verify_greedy(draft, target, lens))
    assert_same(got, from_reference(draft, None, lens, logits))


@pytest.mark.parametrize("vocab", [1, 7, 8, 33, 256, 512, 513, 1100, 33000])
@pytest.mark.parametrize("rows", [1, 8])
def test_p33_ties_and_nan_follow_torch_argmax(isa, dtype, vocab, rows, by_threads):
    """Both ways of sharing out the work (over a row's parts, over requests), with maxima at every kind of place."""
    places = sorted({0, vocab - 1, vocab // 2, min(255, vocab - 1), min(256, vocab - 1), min(16384, vocab - 1)})
    for fill, special in [(-1.0, (2.0,)), (-INF, (-INF,)), (0.0, (-0.0, 0.0)), (1.0, (INF, INF)), (INF, (NAN,)),
                          (-1.0, (NAN, INF)), (-1.0, (INF, -INF, INF)), (-INF, (-5.0, -5.0))]:
        for at in places:
            logits = torch.full((rows, 1, vocab), fill).to(dtype)
            for k, value in enumerate(special):
                logits[:, 0, min(at + k * 37, vocab - 1)] = value
            drafts, lens = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
            for got in by_threads(lambda: verify_greedy(drafts, None, lens, logits=logits)):  # noqa: B023
                assert got.bonus.tolist() == logits[:, 0].argmax(-1).tolist(), (fill, special, at)


def test_p33_random_ties_and_nan(isa, dtype):
    logits = torch.randint(-3, 4, (64, 3, 700)).to(dtype)
    logits[torch.rand(64, 3, 700) < 0.0007] = NAN
    want = logits.argmax(-1)
    draft = torch.cat([torch.zeros(64, 1, dtype=torch.int64), want[:, :-1]], 1)
    assert logits.isnan().any(-1).float().mean() > 0.1
    assert torch.equal(verify_greedy(draft, None, torch.zeros(64, dtype=torch.int32), logits=logits).tokens, want)


def test_p32_a_padded_vocabulary_tail_never_wins(isa, dtype):
    logits = torch.randn(3, 6, 320).to(dtype)
    logits[..., 300:] = INF
    logits[..., 310] = NAN
    crop = logits[:, 1:5, :300]
    target = crop.argmax(-1)
    draft = drafts_that_agree(target, [0, 2, 3])
    got = verify_greedy(draft, None, int32(1, 2, 3), logits=crop)
    assert_same(got, verify_greedy(draft, target, int32(1, 2, 3)))
    assert got.tokens.max() < 300


def test_p34_a_draft_id_outside_the_target_vocabulary_is_rejected(isa, dtype):
    target = torch.tensor([[4, 5, 6], [4, 5, 6]])
    draft = torch.tensor([[1, 9, 5], [1, 4, -1]])
    got = verify_greedy(draft, None, int32(0, 0), logits=logits_for(target, 7, dtype))
    assert got.accept_lens.tolist() == [0, 1] and got.bonus.tolist() == [4, 5]


def test_p17_only_committed_rows_would_be_written(isa):
    """Ragged acceptance: the next block of each request starts where its own committed tokens end."""
    target = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    got = verify_greedy(drafts_that_agree(target, [0, 3, 1]), target, int32(10, 20, 30), block_lens=int32(4, 4, 0))
    assert got.commit_lens.tolist() == [1, 4, 0] and got.new_lens.tolist() == [11, 24, 30]
    nxt = prepare_block(got.bonus, got.new_lens, 2, 99)
    assert nxt.ids[:, 0].tolist() == [1, 4, -1] and nxt.positions[:, 0].tolist() == [11, 24, 30]


def test_rows_that_cannot_matter_are_poison(isa, dtype):
    """Rows past a request's length, all rows of a padded request, and its ids, may hold anything."""
    target = torch.randint(0, 30, (3, 5))
    draft = drafts_that_agree(target, [4, 4, 4])
    logits = logits_for(target, 40, dtype)
    widths, lens = int32(2, 0, 5), int32(7, 8, 9)
    clean = verify_greedy(draft, None, lens, logits=logits, block_lens=widths)
    assert clean.commit_lens.tolist() == [2, 0, 5]
    for b, w in enumerate(widths.tolist()):
        logits[b, w:], draft[b, w:], target[b, w:] = NAN, 2**62, -(2**62)
    assert_same(verify_greedy(draft, None, lens, logits=logits, block_lens=widths), clean)
    assert_same(verify_greedy(draft, target, lens, block_lens=widths), clean)


def test_lengths_beyond_the_block_are_clamped(isa):
    target = torch.randint(0, 30, (2, 3))
    draft, lens = drafts_that_agree(target, [2, 2]), int32(5, 5)
    full, none = verify_greedy(draft, target, lens), verify_greedy(draft, target, lens, block_lens=int32(-9, -9))
    assert_same(verify_greedy(draft, target, lens, block_lens=int32(3, 2**31 - 1)), full)
    assert none.commit_lens.tolist() == [0, 0] and none.bonus.tolist() == [-1, -1]


def test_strided_inputs_and_outputs_leave_their_neighbours_alone(isa, dtype):
    target = torch.randint(0, 30, (4, 9))
    draft = drafts_that_agree(target[:, 2:7], [0, 1, 4, 3])
    padded = torch.cat([target, draft], 1)
    logits = logits_for(target[:, 2:7], 31, dtype)
    wide = torch.full((4, 9, 50), NAN, dtype=dtype)
    wide[:, 1:6, 9:40] = logits
    tokens, lens = torch.full((4, 9), -7), int32(1, 2, 3, 4)
    ints = [torch.full((8,), -7, dtype=torch.int32) for _ in range(3)]
    bonus = torch.full((8,), -7)
    out = Verified(ints[0][2:6], ints[1][2:6], tokens[:, 2:7], bonus[2:6], ints[2][2:6])
    want = from_reference(draft, target[:, 2:7], lens)
    for kwargs, ids in [({}, padded[:, 2:7]), ({"logits": wide[:, 1:6, 9:40]}, None)]:
        tokens.fill_(-7)
        assert verify_greedy(padded[:, 9:], ids, lens, out=out, **kwargs) is out
        assert_same(out, want)
        assert (tokens[:, :2] == -7).all() and (tokens[:, 7:] == -7).all()
        for t in (*ints, bonus):
            assert (t[:2] == -7).all() and (t[6:] == -7).all()


def test_new_lens_may_be_context_lens_and_tokens_target_ids(isa):
    target = torch.randint(0, 30, (3, 4))
    draft, lens = drafts_that_agree(target, [0, 3, 1]), int32(1, 2, 3)
    want = from_reference(draft, target, lens)
    out = empty_like_result(3, 4)
    out = Verified(out.accept_lens, out.commit_lens, target, out.bonus, lens)
    assert_same(verify_greedy(draft, target, lens, out=out), want)


@pytest.mark.parametrize("q", [1, 3, 8, 16])
def test_a_request_alone_equals_the_same_request_in_a_batch(isa, dtype, q):
    target = torch.randint(0, 900, (6, q))
    draft, lens = drafts_that_agree(target, [0, 1, 2, 5, 9, 20]), torch.arange(6, dtype=torch.int32)
    logits = logits_for(target, 901, dtype)
    whole = verify_greedy(draft, None, lens, logits=logits)
    assert_same(verify_greedy(draft, None, lens, logits=logits), whole)
    for b in range(6):
        one = slice(b, b + 1)
        alone = verify_greedy(draft[one], None, lens[one], logits=logits[one])
        assert_same(alone, Verified(*(getattr(whole, f)[one] for f in FIELDS)))


@pytest.mark.skipif(not StepGraph.available(), reason="recorded steps need the C++ library")
def test_p20_a_recorded_verification_follows_lengths_that_change(isa, dtype):
    target = torch.randint(0, 30, (3, 4))
    draft, lens, widths = drafts_that_agree(target, [0, 3, 1]), int32(1, 2, 3), int32(4, 4, 4)
    logits, out = logits_for(target, 31, dtype), empty_like_result(3, 4)
    graph = StepGraph()
    with graph.capture():
        verify_greedy(draft, None, lens, logits=logits, block_lens=widths, out=out)
    assert_same(out, from_reference(draft, None, lens, logits, widths))
    target = torch.randint(0, 30, (3, 4))
    draft.copy_(drafts_that_agree(target, [3, 1, 0]))
    logits.copy_(logits_for(target, 31, dtype))
    lens.copy_(int32(9, 8, 7))
    widths.copy_(int32(3, 0, 4))
    graph.replay()
    assert_same(out, from_reference(draft, None, lens, logits, widths))


def test_bad_input_names_what_was_expected_and_got():
    d, c, x = torch.zeros(2, 3, dtype=torch.int64), int32(0, 0), torch.zeros(2, 3, 5)
    for message, error, args, kwargs in [
        (r"draft_ids must be int64 \(B, Q\); got float32 \(2, 3\)", TypeError, (d.float(), d, c), {}),
        (r"draft_ids must have Q >= 1, the anchor's column; got int64 \(2, 0\)", ValueError, (d[:, :0], d, c), {}),
        (r"target_ids or logits must be given, and not both; got NoneType and NoneType", ValueError, (d, None, c), {}),
        (r"target_ids or logits must be given, and not both", ValueError, (d, d, c), {"logits": x}),
        (r"target_ids must have shape \(B, Q\) = \(2, 3\); got int64 \(2, 2\)", ValueError, (d, d[:, 1:], c), {}),
        (r"context_lens must be int32 \(B,\); got int64 \(2,\)", TypeError, (d, d, c.long()), {}),
        (r"logits must be contiguous in its last dimension", ValueError, (d, None, c),
         {"logits": torch.zeros(2, 5, 3).transpose(1, 2)}),
        (r"logits must have V >= 1", ValueError, (d, None, c), {"logits": x[..., :0]}),
        (r"logits must be float32, bfloat16 or float16", TypeError, (d, None, c), {"logits": x.double()}),
        (r"block_lens must have shape", ValueError, (d, d, c), {"block_lens": c[:1]}),
        (r"out must be a Verified; got tuple", TypeError, (d, d, c), {"out": ()}),
        (r"out.bonus must be int64", TypeError, (d, d, c), {"out": Verified(c, c, d, c, c)}),
    ]:
        with pytest.raises(error, match="^verify_greedy: " + message):
            verify_greedy(*args, **kwargs)


def test_values_are_checked_on_request(monkeypatch):
    d, c = torch.zeros(1, 3, dtype=torch.int64), int32(-1)
    verify_greedy(d, d, c)
    monkeypatch.setenv("DFLASH_CHECK", "1")
    with pytest.raises(ValueError, match="verify_greedy: context_lens must be at least 0; got -1"):
        verify_greedy(d, d, c)
    with pytest.raises(ValueError, match=r"verify_greedy: block_lens must be in \[0, 3\]; got \[4\]"):
        verify_greedy(d, d, -c, block_lens=int32(4))
