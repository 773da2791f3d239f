"""What verify_sample's answers must not depend on, and bugs that were reported elsewhere."""

import pytest
import torch

from dflash_kernels import LogitAdjustments, Proposal, SamplingTensors, StepGraph, Verified, sample_draft, verify_sample
from dflash_kernels.testing import same_bits
from tests.support.sample_inputs import KINDS, block, int32, one_of, params, proposal, same, some_params
from tests.support.sample_margin import agree, one

NAN, INF = float("nan"), float("inf")


# ---- invariances ---------------------------------------------------------------------------------------------------

def whole_batch(b=6, v=1200):
    logits = torch.randn(b, 4, v)
    return block(logits), logits, torch.arange(b).int() * 3, some_params(b, "all", 4)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_alone_equals_the_same_request_in_a_batch_in_any_order(vector_isa, kind, rule):
    draft, logits, lens, p = whole_batch()
    q = proposal(kind, logits)
    whole = verify_sample(draft, logits, lens, p, proposal=q, rule=rule)
    same(verify_sample(draft, logits, lens, p, proposal=q, rule=rule), whole)
    for b in range(6):
        alone = verify_sample(draft[b:b + 1], logits[b:b + 1], lens[b:b + 1], one(p, b), proposal=one(q, b), rule=rule)
        same(alone, one(whole, b))
    order = torch.randperm(6)
    pick = lambda record: record and type(record)(  # noqa: E731
        **{n: None if t is None else t[order] for n, t in vars(record).items()})
    same(verify_sample(draft[order], logits[order], lens[order], pick(p), proposal=pick(q), rule=rule), pick(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_nothing(vector_isa, kind):
    """One thread, and more threads than requests, whose rows are then shared out."""
    draft, logits, lens, p = whole_batch()
    q, before = proposal(kind, logits), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([verify_sample(draft[:n], logits[:n], lens[:n], one_of(p, n), proposal=q and one_of(q, n),
                                        rule=rule) for n in (1, 6) for rule in ("token", "block")])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        same(a, b)


@pytest.mark.parametrize("filters", ["baseline", "all"])
def test_one_hot_text_depends_on_neither_the_block_size_nor_the_drafts(vector_isa, filters):
    """A chain target: its logits after token t are table[t]."""
    b, v, length = 12, 40, 24
    table, p = torch.randn(v, v) * 2, some_params(b, filters, 5)
    texts = []
    for q, seed in ((1, 0), (2, 1), (4, 2), (8, 3), (8, 4)):
        draw = torch.Generator().manual_seed(seed)
        text, anchor, lens = [[] for _ in range(b)], torch.full((b,), 3), torch.full((b,), 10, dtype=torch.int32)
        while min(map(len, text)) < length:
            draft = anchor[:, None].repeat(1, q)
            for i in range(1, q):
                likely, other = table[draft[:, i - 1]].argmax(-1), torch.randint(0, v, (b,), generator=draw)
                draft[:, i] = torch.where(torch.rand(b, generator=draw) < 0.7, likely, other)
            got = verify_sample(draft, table[draft], lens, p)
            for r, row in enumerate(got.tokens.tolist()):
                text[r] += [t for t in row if t >= 0]
            anchor, lens = got.bonus, got.new_lens
        texts.append([t[:length] for t in text])
    assert all(t == texts[0] for t in texts)
    assert len({tuple(t) for t in texts[0]}) > b // 2


@pytest.mark.skipif(not StepGraph.available(), reason="recorded steps need the C++ library")
@pytest.mark.parametrize("kind", KINDS)
def test_p20_a_recorded_verification_follows_what_changes(vector_isa, dtype, kind):
    logits = torch.randn(3, 4, 1030).to(dtype)
    draft, lens, widths, p, q = block(logits), int32(1, 2, 3), int32(4, 4, 4), params(3), proposal(kind, logits)
    ints = [torch.zeros(3, dtype=torch.int32) for _ in range(2)]
    out = Verified(*ints, torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), lens)
    graph = StepGraph()
    with graph.capture():
        verify_sample(draft, logits, lens, p, proposal=q, block_lens=widths, out=out)
    logits.copy_(torch.randn(3, 4, 1030))
    draft.copy_(block(logits))
    lens.copy_(int32(9, 8, 7))
    widths.copy_(int32(3, 0, 4))
    p.seeds.add_(1000)
    p.temperature.copy_(torch.tensor([0.0, 1.0, 0.6]))
    want = verify_sample(draft, logits, lens.clone(), p, proposal=q, block_lens=widths)
    graph.replay()
    same(out, want)


# ---- bugs reported elsewhere (FIELD_NOTES) -------------------------------------------------------------------------

def test_p25_greedy_drafts_are_one_hot_and_q_is_what_was_drawn_from(vector_isa):
    """The drafter's own temperature is in q: the drafts' frequencies are out_probs, and a greedy request's q is 1."""
    b, n = 40000, 12
    p = SamplingTensors(torch.full((b,), 0.5), torch.arange(b))
    p.temperature[::2] = 0.0
    values = torch.randn(1, 1, n).sort(-1, descending=True).values.expand(b, 1, n).contiguous()
    names = torch.randperm(900)[:n].expand(b, 1, n).contiguous()
    ids, probs = sample_draft(values, names, torch.full((b,), 9, dtype=torch.int32), p)
    assert (ids[::2] == names[0, 0, 0]).all() and same_bits(probs[0, 0], torch.eye(n)[0])
    wanted = (values[0, 0] / 0.5).softmax(-1)
    assert torch.allclose(probs[1, 0], wanted, atol=1e-6)
    seen = torch.stack([(ids[1::2, 0] == name).double().mean() for name in names[0, 0]])
    assert (seen - wanted).abs().max() < 5 * (0.25 / (b / 2)) ** 0.5


def test_p26_a_greedy_request_in_a_sampled_batch_ignores_its_proposal(vector_isa, dtype):
    logits = torch.randn(8, 4, 500).to(dtype)
    most_likely, p = logits.float().argmax(-1), some_params(8, "all", 2)
    draft = torch.cat([torch.zeros(8, 1, dtype=torch.int64), logits.argmax(-1)[:, :-1]], 1)
    draft[4:, 2] = (draft[4:, 2] + 1) % 500
    for kind in KINDS:
        for rule in ("token", "block"):
            got = verify_sample(draft, logits, int32(*range(8)), p, proposal=proposal(kind, logits), rule=rule)
            assert got.accept_lens[::2].tolist() == [3, 3, 1, 1]
            for b in range(0, 8, 2):
                n = int(got.commit_lens[b])
                assert (
                    logits[b, range(n), got.tokens[b, :n]].tolist() == logits[b, range(n), most_likely[b, :n]].tolist()
                )


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_p27_the_temperature_is_applied_once(vector_isa, temperature):
    """Two tokens whose logits differ by 1: the likelier one comes up 1 / (1 + exp(-1 / temperature)) of the time."""
    b = 20000
    p = SamplingTensors(torch.full((b,), temperature), torch.arange(b))
    logits = torch.tensor([0.0, 1.0]).expand(b, 1, 2)
    got = verify_sample(torch.zeros(b, 1, dtype=torch.int64), logits, torch.zeros(b, dtype=torch.int32), p)
    share = torch.tensor(1 / temperature).sigmoid().item()
    assert abs(got.bonus.double().mean().item() - share) < 5 * (share * (1 - share) / b) ** 0.5


def test_p32_a_padded_vocabulary_tail_is_never_drawn(vector_isa, dtype):
    for tail in (NAN, INF, 60000.0):
        padded = torch.full((6, 3, 1100), tail, dtype=dtype)
        padded[..., :1027] = torch.randn(6, 3, 1027)
        crop, draft = padded[..., :1027], block(padded[..., :1027])
        draft[3:, 1] = 1050
        got = verify_sample(draft, crop, torch.arange(6).int(), some_params(6))
        same(got, verify_sample(draft, crop.clone(), torch.arange(6).int(), some_params(6)))
        assert got.tokens.max() < 1027 and got.accept_lens[3:].tolist() == [0] * 3


@pytest.mark.parametrize("rule", ["token", "block"])
def test_p34_a_draft_or_a_candidate_outside_the_vocabulary_is_rejected(vector_isa, rule):
    logits = torch.randn(8, 3, 100)
    draft = block(logits)
    draft[:, 1] = torch.tensor([-1, 100, 2**40, -(2**62)] * 2)
    sparse = Proposal(probs=torch.full((8, 2, 4), 0.25),
                      ids=torch.stack([draft[:, 1:], *(torch.full((8, 2), n) for n in (5, -9, 100))], -1))
    for q in (None, sparse, proposal("dense", logits), proposal("logits", logits)):
        got = verify_sample(draft, logits, torch.arange(8).int(), params(8), proposal=q, rule=rule)
        assert got.accept_lens.tolist() == [0] * 8 and got.bonus.min() >= 0 and got.bonus.max() < 100
        agree(draft, logits, torch.arange(8).int(), params(8), q, None, rule)


@pytest.mark.parametrize("kind", KINDS)
def test_p38_adjustments_decide_acceptance_too(vector_isa, kind):
    """A draft that a grammar forbids is rejected, also where the bare logits would take it for certain, and one that a
    penalty has made unlikely is judged by the penalised logits."""
    logits = torch.randn(6, 2, 90)
    logits[..., 33] = 50.0
    draft = torch.full((6, 2), 33)
    words = torch.full((6, 2, 3), -1, dtype=torch.int32)
    masked, seen = words.clone(), torch.zeros_like(words)
    masked[..., 1] = ~2
    seen[..., 1] = 2
    q = proposal(kind, logits)
    for temp in (1.0, 0.0):
        plain = verify_sample(draft, logits, int32(*range(6)), params(6, temp), proposal=q)
        assert plain.accept_lens.tolist() == [1] * 6
        for changes in (LogitAdjustments(bitmask=masked),
                        LogitAdjustments(seen=seen, repetition_penalty=torch.full((6,), 1e6)) if temp == 0
                        else LogitAdjustments(bias=torch.where(torch.arange(90) == 33, -100.0, 0.0).expand(6, 2, 90))):
            for rule in ("token", "block"):
                got = verify_sample(draft, logits, int32(*range(6)), params(6, temp), proposal=q, adjustments=changes,
                                    rule=rule)
                assert got.accept_lens.tolist() == [0] * 6 and not (got.tokens == 33).any()
