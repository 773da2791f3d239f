"""The selector's training: its blocks are those that decoding drafts, and what it learns is what the op chooses."""

import pytest
import torch

from dflash_decode import Session
from dflash_decode.model.dflash2 import NAMES, PREFIX, read_selector, write_selector
from dflash_kernels import select_candidates
from tools.training.replay import Blocks, Replay, Text
from tools.training.selector import (
    Selector,
    before_each,
    calibration_of,
    collect,
    loss_of,
    take,
    train,
    walk,
    weights_of,
)

N, Q, K, H, V = 2048, 4, 3, 8, 40


def test_blocks_are_those_of_decoding():
    session = Session.load("smollm2", block_size=8)
    prompts = ["Count from one to ten.", "What is a prime number?", "Name the days of the week."]
    run = session.run(prompts, max_tokens=40)
    texts = [Text(n, [*ids, *answer.tokens], len(ids)) for n, (answer, ids) in enumerate(
        zip(run.answers, map(session.prompt_ids, prompts), strict=True))]
    blocks = collect(Replay(session, batch=2, candidates=4).blocks(texts), most=10_000)
    for text, answer in zip(texts, run.answers, strict=True):
        own = take(blocks, (blocks.texts == text.number).nonzero()[:, 0])
        # The last step of an answer is cut at max_tokens, where the text ends too.
        assert [n + 1 for n in own.accepted.tolist()][:-1] == list(answer.steps)[:-1]
        place = text.start
        for anchor, accepted, truth in zip(own.anchors, own.accepted, own.truth, strict=True):
            after = text.ids[place + 1:place + 8]
            assert anchor == text.ids[place] and truth.tolist() == after + [-1] * (7 - len(after))
            place += int(accepted) + 1


def planted(seed):
    """Blocks whose text follows a rule that no single position knows: after token t comes 3 t + 1 modulo V."""
    random = torch.Generator().manual_seed(seed)
    anchors = torch.randint(V, (N,), generator=random)
    truth = [3 * anchors + 1]
    for _ in range(Q - 2):
        truth.append(3 * truth[-1] + 1)
    truth = torch.stack(truth, 1) % V
    ids = torch.stack([truth, (truth + 7) % V, (truth + 11) % V], -1)
    ids = ids.gather(-1, torch.rand(ids.shape, generator=random).argsort(-1))  # the right one anywhere among them
    accepted = (ids[..., 0] == truth).long().cumprod(-1).sum(-1)
    values = torch.tensor([0.2, 0.1, 0.0]).expand(N, Q - 1, K).contiguous()
    return Blocks(torch.arange(N), anchors, torch.ones(N, Q - 1, H), values, ids, truth, accepted)


@pytest.fixture(scope="module")
def learned():
    torch.manual_seed(0)
    selector = Selector(torch.randn(V, 32), torch.arange(V), rank=16)
    selector.hidden = torch.nn.Parameter(torch.randn(H, 16))
    train(selector, planted(1), epochs=30, rate=2e-2)
    return selector


def test_it_learns_which_token_follows_which(learned):
    new = planted(2)
    assert new.accepted.float().mean() < 0.8 < 2.5 < walk(learned, new)[0].float().mean()


def test_it_goes_on_from_what_was_written(learned, tmp_path):
    write_selector(tmp_path, *learned.codebooks(), learned.hidden.T, K)
    books, _ = read_selector(tmp_path, None, V)
    later = Selector(learned.embedding, torch.arange(V), rank=16, seed=1)
    later.hidden = torch.nn.Parameter(torch.randn(H, 16))
    later.start_from(*(books[PREFIX + name] for name in NAMES))
    new = planted(3)
    assert (walk(later, new)[0] == walk(learned, new)[0]).float().mean() > 0.99  # the file has bfloat16


@pytest.mark.parametrize("vocabulary", [None, torch.arange(0, 3 * V, 3)])
def test_the_op_chooses_what_was_learned(learned, vocabulary, tmp_path):
    """From the file that is written, also where the draft vocabulary is a part of the target's."""
    write_selector(tmp_path, *learned.codebooks(), learned.hidden.T, K)
    size = V if vocabulary is None else 3 * V
    tensors, fields = read_selector(tmp_path, vocabulary, size)
    assert fields == {"selector_rank": 16, "selector_top_k": K}
    blocks = planted(3)
    name = vocabulary if vocabulary is not None else torch.arange(V)
    before, after, projection = (tensors[f"candidate_selector.{n}"].float() for n in (
        "predecessor_codebook", "successor_codebook", "hidden_projection.weight"))
    assert before.shape == (size, 16)
    drafts, _, _ = select_candidates(blocks.values, name[blocks.ids], blocks.hidden @ projection.T,
                                     name[blocks.anchors], before, after, torch.zeros(N, dtype=torch.int32))
    accepted = (drafts == name[blocks.truth]).long().cumprod(-1).sum(-1)
    # The file has bfloat16, so a close choice may fall otherwise.
    assert (accepted == walk(learned, blocks)[0]).float().mean() > 0.99


def test_the_loss_counts_what_a_walk_can_reach():
    blocks = planted(1)
    assert torch.equal(before_each(blocks)[:, 1:], blocks.truth[:, :-1])
    weights = weights_of(blocks)
    for b in range(50):
        accepted = int(blocks.accepted[b])
        assert weights[b, :accepted + 1].eq(1).all() and weights[b, accepted + 1:].lt(1).all()
    lost = blocks._replace(ids=blocks.ids.clone())
    lost.ids[:, 1] = 39 - lost.truth[:, 1:2]  # the text's token is no candidate: nothing behind it counts
    lost = take(lost, (lost.truth[:, 1] * 2 != 39).nonzero()[:, 0])
    assert weights_of(lost)[:, 1:].eq(0).all() and weights_of(lost)[:, 0].gt(0).all()
    assert torch.isfinite(loss_of(Selector(torch.randn(V, 32), torch.arange(V), 4), blocks._replace(
        hidden=torch.randn(N, Q - 1, 32))))


def test_the_calibration_is_how_often_drafts_are_accepted():
    """Drafts are right as often as sigmoid(0.5 * logit(sure) + 1) says at the first place, and never at the third."""
    random = torch.Generator().manual_seed(4)
    sure = torch.rand(200_000, 3, generator=random)
    right = torch.rand(sure.shape, generator=random) < torch.sigmoid(
        0.5 * torch.logit(sure) + torch.tensor([1.0, -0.5, -9.0]))
    found = calibration_of(right.long().cumprod(-1).sum(-1), sure)
    assert found["slope"] == pytest.approx(0.5, abs=0.03)
    assert found["bias"][:2] == pytest.approx([1.0, -0.5], abs=0.05) and found["bias"][2] < -6
