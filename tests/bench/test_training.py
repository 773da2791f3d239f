"""The training recipe: its model is the one that our ops run, and its losses are torch's."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.native import NativeTarget
from tests.bench.conftest import MASK
from tests.support.clocks import Ticks
from tests.support.tiny import VOCAB
from tools.training import checkpoint, optimise, plots
from tools.training.drafter import HeadLoss, Shape, TrainedDrafter, _Attention

pytestmark = pytest.mark.usefixtures("eager")


def test_target_is_transformers_llama(folder, target):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(ids, output_hidden_states=True)
        final, seen = target.forward(ids, (0, 2))
    assert (F.linear(final, target.head) - expected.logits).abs().max() < 0.03 * expected.logits.abs().max()
    for tap, got in zip((0, 2), seen, strict=True):
        want = expected.hidden_states[tap + 1]
        assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_block_attention_equals_dense_attention_with_its_mask():
    shape = Shape(64, 96, 1, 4, 2, 16, (0,), 4, MASK, 1e-6, 1e4)
    generator = torch.Generator().manual_seed(0)
    anchors = torch.tensor([[3, 7, 7], [1, 2, 10]])

    def rows(n, heads):
        return torch.randn((2, n, heads, 16), generator=generator).bfloat16().requires_grad_()

    inputs = rows(12, 4), rows(10, 2), rows(10, 2), rows(12, 2), rows(12, 2)
    flash, dense = _Attention(shape, anchors, 10, 4), _Attention(shape, anchors.to("cpu"), 10, 4)
    dense.flash = False
    seen = torch.arange(10) < anchors[..., None]
    own = torch.eye(3, dtype=torch.bool).repeat_interleave(4, 1).expand(2, -1, -1)
    dense.mask = torch.cat((seen, own), -1).repeat_interleave(4, 1)[:, None]
    weight = torch.randn((2, 12, 64), generator=generator).bfloat16()
    results = []
    for attend in (flash, dense):
        out = attend(*inputs)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_head_loss_and_its_gradient_are_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((50, 32), generator=generator).requires_grad_()
    head = torch.randn((40, 32), generator=generator) * 0.3
    labels = torch.randint(0, 40, (50, 3), generator=generator)
    shares, weight = torch.rand((50, 3), generator=generator), torch.rand(50, generator=generator)
    shares = shares / shares.sum(-1, keepdim=True)
    shares[7], shares[8], weight[9] = 0, shares[8] / 3, 0
    bias = torch.randn(40, generator=generator)
    losses, best = HeadLoss.apply(hidden, head, bias, labels, shares, 30)
    got, = torch.autograd.grad((losses * weight).sum(), hidden)
    logs = F.linear(hidden, head, bias).log_softmax(-1)
    want = -(logs.gather(1, labels) * shares).sum(-1)
    expected, = torch.autograd.grad((want * weight).sum(), hidden)
    assert torch.allclose(losses, want, atol=1e-5) and torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(best, F.linear(hidden, head, bias)[:, :30].argmax(-1))


@pytest.mark.parametrize("drafter", [{}, {"taps": 2, "group": 16}, {"taps": 6, "group": 8}], indirect=True, ids=str)
def test_trained_model_is_the_one_that_our_ops_run(folder, target, drafter, tmp_path):
    """From the same features, the exported checkpoint drafts in our loop's layers what the trained module says."""
    checkpoint.write(tmp_path, drafter, target, torch.arange(VOCAB))
    found, theirs = load_checkpoint(tmp_path), load_checkpoint(folder)
    native = NativeTarget(theirs.config, theirs.tensors, dtype=torch.float32)
    ours = Drafter(found.config, {name: t.float() for name, t in found.tensors.items()}, native)
    prompt = torch.randint(0, VOCAB, (1, 14), generator=torch.Generator().manual_seed(2))
    context, width = 13, 4
    _, seen = target.forward(prompt, (0, 2))
    features = torch.cat(seen, -1)[0, :context].float()
    caches = ours.cache.allocate(4, 16)
    table = torch.arange(4, dtype=torch.int32)[None]
    positions = torch.arange(context)[None]
    ours.make_context(1, context, caches).run(features, positions, positions.clone(),
                                              torch.tensor([context], dtype=torch.int32))
    draft = ours.make_draft(1, width, caches, 16)
    draft.anchors[0] = prompt[0, context]
    ids = draft.run(torch.tensor([context], dtype=torch.int32), table, torch.tensor([width], dtype=torch.int32))
    with torch.no_grad():
        hidden = drafter((features / drafter.feature_scale)[None].bfloat16(), torch.tensor([[context]]),
                         prompt[:, context:], width, target.embedding)[0, 0].float()
    got = draft.masked
    assert (got - hidden).abs().max() < 0.05 * got.abs().max()
    logits = F.linear(got, target.head.float())
    assert torch.equal(ids[0, 1:], logits.argmax(-1))


def test_features_are_the_target_s(target, written):
    rows, features = written
    assert len(features) == len(rows) and features.target_layer_ids == (0, 2)
    for i in (0, 7, 31):
        at, end = features.offsets[i], features.offsets[i + 1]
        final, seen = target.forward(features.ids[at:end][None].long(), (0, 2))
        want = torch.cat(seen, -1)[0] / features.scale.bfloat16()
        assert (features.states[at:end].float() - want.float()).abs().max() < 0.05 * want.abs().max()
        top = F.linear(final[0, features.starts[i] - 1:-1], target.head).argmax(-1)
        assert (features.likely[at + features.starts[i]:end, 0] == top).float().mean() > 0.9
        assert features.greedy[i] == (rows[i]["temperature"] == 0)


def test_batch_labels_are_the_tokens_after_the_anchor(written):
    _, features = written
    vocabulary = optimise.Vocabulary(optimise.most_frequent(features, range(len(features)), VOCAB), VOCAB)
    batch = optimise.Batch(features, [3, 9], 6, 4, vocabulary, 0.5, random.Random(1), "cpu")
    for row, i in enumerate((3, 9)):
        ids = features.ids[features.offsets[i]:features.offsets[i + 1]].long()
        for block, anchor in enumerate(batch.anchors[row].tolist()):
            assert features.starts[i] <= anchor < len(ids) - 1 and batch.anchor_ids[row, block] == ids[anchor]
            for k in range(3):
                inside = anchor + 1 + k < len(ids)
                assert bool(batch.counts[row, block, k]) == inside
                if inside:
                    assert vocabulary.ids[batch.labels[row, block, k, 0]] == ids[anchor + 1 + k]
                else:
                    assert batch.shares[row, block, k].sum() == 0
    shares = batch.shares.sum(-1)[batch.counts]
    assert torch.allclose(shares, torch.ones_like(shares), atol=1e-2)


def test_blocks_begin_rather_where_the_target_was_unsure(written, monkeypatch):
    """Here it is sure of every even place and of no odd one."""
    _, features = written
    whole, which = type(features).batch, range(len(features))
    monkeypatch.setattr(features, "batch", lambda chosen: (found := whole(features, chosen))._replace(
        odds=((torch.arange(found.odds.shape[1]) + 1) % 2)[None, :, None].expand(found.odds.shape).float()))
    vocabulary, draw, unsure = optimise.Vocabulary(torch.arange(VOCAB), VOCAB), random.Random(0), {}
    for evenly in (True, False):
        anchors = torch.cat([optimise.Batch(features, which, 3, 4, vocabulary, 0.5, draw, "cpu", evenly=evenly).anchors
                             for _ in range(20)])
        assert (anchors.diff() > 0).all()
        for places, i in zip(anchors, list(which) * 20, strict=True):
            assert features.starts[i] <= places[0] and places[-1] < features.length(i) - 1
        unsure[evenly] = (anchors % 2).float().mean()
    assert 0.4 < unsure[True] < 0.6 and unsure[False] > 0.75


def test_training_learns_and_goes_on_where_it_stopped(target, written, tmp_path, monkeypatch):
    _, features = written
    monkeypatch.setattr(optimise, "time", SimpleNamespace(perf_counter=Ticks()))  # a step takes a second
    recipe = optimise.Recipe(texts=4, blocks=4, vocabulary=64, negatives=0, minutes=1 / 60)

    def make():
        drafter = TrainedDrafter(Shape.of(target, 1, (0, 2), 4, MASK), target.norm, features.scale)
        return optimise.Training(drafter, target, features, recipe, tmp_path)

    first = make()
    assert not first.resume()
    assert not set(first.held_out) & set(first.used) and all(features.greedy[i] for i in first.held_out)
    losses = [first.advance(optimise.Group(first.used[:4]), 0.2) for _ in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    first.run(evaluations=1)
    assert first.step == 41 and 1 <= first.history[-1]["acceptance"] <= 4
    second = make()
    assert second.resume() and (second.step, second.seconds) == (first.step, first.seconds)
    for name, weight in second.drafter.state_dict().items():
        assert torch.equal(weight, first.drafter.state_dict()[name])
    after = [training.advance(optimise.Group(first.used[:4]), 0.2) for training in (first, second)]
    assert after[0] == after[1]
    plots.plot(second.history * 2, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_was_cut_off_is_the_run_that_was_not(target, written, tmp_path):
    recipe = optimise.Recipe(texts=2, blocks=4, vocabulary=64, minutes=None, steps=70, visits=2, early_share=0.0)

    def made(folder):
        folder.mkdir(exist_ok=True)
        drafter = TrainedDrafter(Shape.of(target, 1, (0, 2), 4, MASK), target.norm, written[1].scale)
        return optimise.Training(drafter, target, written[1], recipe, folder)

    whole = made(tmp_path / "whole")
    for _ in range(70):
        whole.advance(whole.group(), 0.5)
    for steps in (33, 37):
        part = made(tmp_path / "parts")
        assert part.resume() == (steps == 37)
        for _ in range(steps):
            part.advance(part.group(), 0.5)
        part.save()
    assert part.step == 70 and all(torch.equal(a, b) for a, b in zip(
        part.drafter.parameters(), whole.drafter.parameters(), strict=True))


def test_too_few_texts_are_an_error(target, written, tmp_path):
    for recipe, seen in ((optimise.Recipe(texts=1000), ()), (optimise.Recipe(texts=2), set(written[1].prompts))):
        drafter = TrainedDrafter(Shape.of(target, 1, (0, 2), 4, MASK), target.norm, written[1].scale)
        with pytest.raises(ValueError, match="training: texts must be at least .* for a step and some to hold out"):
            optimise.Training(drafter, target, written[1], recipe, tmp_path, seen)


@pytest.mark.parametrize("minutes, steps, made", [(None, 7, 7), (1, 7, 7), (4 / 60, 7, 4)])
def test_a_run_ends_with_its_minutes_or_its_steps(minutes, steps, made, target, written, tmp_path, monkeypatch):
    monkeypatch.setattr(optimise, "time", SimpleNamespace(perf_counter=Ticks()))
    drafter = TrainedDrafter(Shape.of(target, 1, (0, 2), 4, MASK), target.norm, written[1].scale)
    recipe = optimise.Recipe(texts=2, blocks=2, vocabulary=64, minutes=minutes, steps=steps, decay_from=0.0)
    training = optimise.Training(drafter, target, written[1], recipe, tmp_path)
    training.run(evaluations=2)
    assert (training.step, training.seconds) == (made, made)
    assert [h["step"] for h in training.history] == ([1, 5, 7] if made == 7 else [1, 3, 4])
    rates = [o.param_groups[0]["lr"] for o in training.optimisers]
    assert rates[0] == pytest.approx(recipe.matrix_rate / made * made / optimise.WARM_UP)  # of the last step


def test_a_group_s_next_blocks_begin_where_decoding_would_go_on(target, written, tmp_path):
    _, features = written
    recipe = optimise.Recipe(texts=4, blocks=6, vocabulary=40, negatives=0, early_share=0.0, noise=0.0, visits=3)
    drafter = TrainedDrafter(Shape.of(target, 1, (0, 2), 4, MASK), target.norm, features.scale)
    training = optimise.Training(drafter, target, features, recipe, tmp_path)
    for _ in range(60):  # some drafts are right
        training.advance(optimise.Group(training.used[:4]), 0.5)
    group = optimise.Group(training.used[:4], torch.tensor([features.starts[i] for i in training.used[:4]])[:, None]
                           + torch.arange(6) * 3)
    walked, moved = set(), set()
    for _ in range(4):
        before = group.anchors
        with torch.no_grad():
            batch = optimise.Batch(features, group.which, 6, 4, training.vocabulary, 0.5, random.Random(1), "cpu",
                                   before)
            hidden = drafter(batch.states, batch.anchors, batch.anchor_ids, 4, target.embedding)
            drafts = training.vocabulary.ids[(hidden.flatten(0, 2) @ training.head.T).argmax(-1)].view(4, 6, 3)
        training.advance(group, 1.0)  # at the end of the time the rates are zero
        for row, i in enumerate(group.which):
            text = features.ids[features.offsets[i]:features.offsets[i + 1]].tolist()
            for block in range(6):
                place, accepted = int(before[row, block]), 0
                while accepted < 3 and text[place + 1 + accepted:][:1] == [int(drafts[row, block, accepted])]:
                    accepted += 1
                at = place + accepted + 1
                moved.add(accepted)
                assert group.anchors[row, block] == (at if at < len(text) - 1 else features.starts[i])
                walked.add(at < len(text) - 1)
    assert walked == {True, False} and len(moved) > 1
    seen = []
    for _ in range(3 * optimise.OPEN):
        seen.append(training.group())
        seen[-1].visits += 1
    assert max(map(seen.count, seen)) <= 3 and len(set(seen)) > optimise.OPEN


def test_weights_are_whole_up_to_the_first_rejected_draft():
    weights = optimise.weights_to_rejection(torch.tensor([[0, 2, 3]]), 4)
    assert torch.allclose(weights, torch.exp(-torch.tensor([[[0.0, 0.5, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])))


def test_negatives_stand_for_every_token_outside_the_vocabulary(target, written, tmp_path):
    _, features = written
    recipe = optimise.Recipe(vocabulary=32, negatives=40)
    drafter = TrainedDrafter(Shape.of(target, 1, (0, 2), 4, MASK), target.norm, features.scale)
    training = optimise.Training(drafter, target, features, recipe, tmp_path)
    outside = set(range(target.vocab)) - set(training.vocabulary.ids.tolist())
    rows, log_share = training._negatives()
    assert len(rows) == 40 and math.isclose(log_share.exp().item() * 40, len(outside), rel_tol=1e-5)
    places = [(target.head == row).all(-1).nonzero()[0].item() for row in rows]
    assert len(set(places)) == 40 and set(places) <= outside
    hidden = torch.randn(target.hidden, generator=torch.Generator().manual_seed(0)) * 0.1
    whole = (target.head.float() @ hidden)[sorted(outside)].exp().sum()
    part = sum((training._negatives()[0].float() @ hidden).exp().sum() * log_share.exp() for _ in range(50)) / 50
    assert math.isclose(part, whole, rel_tol=0.05)
