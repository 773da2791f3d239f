"""Drafts drawn from the drafter's distribution: the output's distribution is the target's."""

from collections import Counter

import pytest
import torch

from bench import sampling_distribution as sampling_texts
from dflash_decode.loop import Decoder
from dflash_decode.model import drafter as draft
from dflash_decode.model.drafter import Drafter, DraftPass
from dflash_decode.requests import Request
from dflash_decode.sampling import SamplingParams
from dflash_kernels import StepGraph

pytest.importorskip("transformers")
from tests.support.decode_models import VOCAB, make_target  # noqa: E402
from tests.support.sampled_runs import SAMPLINGS  # noqa: E402

DRAWS = 8_000


class Likely(Drafter):
    """Its candidates are the 16 most likely of distributions that it is told, one for each slot."""

    def make_draft(self, *sizes):
        return LikelyPass(self, *sizes)


class LikelyPass(DraftPass):
    def __init__(self, drafter, batch, *rest):
        super().__init__(drafter, batch, *rest)
        top = drafter.distributions.log().topk(16, -1)
        self.values.copy_(top.values.expand(batch, -1, -1))
        self.proposal.ids.copy_(top.indices.expand(batch, -1, -1))

    def _guess(self, context_lens):
        draft.sample_draft(self.values, self.proposal.ids, context_lens, self.params, out_ids=self.guesses,
                           out_probs=self.proposal.probs)


@pytest.fixture(scope="module")
def texts_of():
    """Texts of a tiny target with drafters of random weights, and with one whose distributions of tokens 2 and 3 are
    the target's, but that it does not know the tokens before."""
    _, target = make_target("llama")
    settings = SamplingParams(0.9, top_p=0.95, min_p=0.002)
    made = {"random": Drafter.random(target, num_layers=2, block_size=3)}
    baseline = sampling_texts.Texts(target, None, [5, 9, 33], VOCAB, tokens=3, width=3)
    first = baseline.distribution(settings)[0]
    second = first @ baseline.distribution(settings, list(range(VOCAB)))
    made["likely"] = Likely.random(target, num_layers=2, block_size=3)
    made["likely"].distributions = torch.stack((second, second)).float() + 1e-9
    texts = {name: sampling_texts.Texts(target, drafter, [5, 9, 33], 1024, tokens=3, width=3)
             for name, drafter in made.items()}
    return settings, texts, texts["random"].sample(settings, range(DRAWS), speculative=False)[0]


def p_values(texts, settings, found):
    return {name: value["p"] for name, value in sampling_texts.against_distribution(texts, found, settings).items()}


def test_baseline_sampling_follows_the_distribution(texts_of):
    settings, texts, baseline = texts_of
    assert min(p_values(texts["random"], settings, baseline).values()) > 1e-3


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("which", ["random", "likely"])
def test_drawn_drafts_keep_the_distribution(texts_of, which, rule, record_property):
    settings, texts, baseline = texts_of[0], texts_of[1][which], texts_of[2]
    found, accepted = texts.sample(settings, range(DRAWS, 2 * DRAWS), draw=True, rule=rule)
    both, cells = sampling_texts.two_samples(*(Counter(map(tuple, t.tolist())) for t in (baseline, found)))
    figures = p_values(texts, settings, found) | {"against_baseline": both}
    for name, p in figures.items():
        record_property(f"p_{name}", p)
        assert p > 1e-3
    assert cells > 50 and (accepted > 0.2 or which == "random")


@pytest.mark.parametrize("fault", ["another's q", "q of another temperature"])
def test_p25_a_q_that_drafts_were_not_drawn_from_is_seen(texts_of, fault, monkeypatch):
    right = draft.sample_draft

    def wrong(values, ids, lens, params, *, out_ids, out_probs):
        right(values, ids, lens, params, out_ids=out_ids, out_probs=out_probs)
        out_probs.copy_(out_probs.roll(1, -1) if fault == "another's q" else torch.softmax(values / 3, -1))

    monkeypatch.setattr(draft, "sample_draft", wrong)
    monkeypatch.setattr(StepGraph, "available", staticmethod(lambda device="cpu": False))
    texts = texts_of[1]["likely"]
    texts.steps.clear()
    found, _ = texts.sample(texts_of[0], range(DRAWS), draw=True)
    texts.steps.clear()
    assert p_values(texts, texts_of[0], found)["first_two"] < 1e-6


def test_candidates_are_the_target_s_ids_of_the_most_likely(monkeypatch):
    """With a draft vocabulary, and with fewer tokens in it than candidates."""
    for size in (40, 9):
        _, target = make_target("llama")
        vocabulary = torch.randperm(VOCAB)[:size].sort().values
        baseline = Drafter.random(target, num_layers=2, block_size=4)
        drafter = Drafter(baseline.config, tensors_of(baseline), target, vocabulary)
        decoder = Decoder(target, drafter, max_context=32, sample_from="request")
        list(decoder.stream([Request(0, [1, 2], 8, (), SAMPLINGS[0])]))
        (step,) = decoder.runner.steps.values()
        k = min(16, size)
        assert step.draft.proposal.ids.shape == (1, 3, k)
        logits = step.draft.masked @ target.embedding.T if drafter.head is None else \
            torch.nn.functional.linear(step.draft.masked, target.head.rows(vocabulary))
        assert torch.equal(step.draft.proposal.ids[0], vocabulary[logits.topk(k, -1).indices])
        assert set(step.draft.ids[0, 1:].tolist()) <= set(vocabulary.tolist())


def tensors_of(drafter):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.1
            for name, size in draft.tensor_shapes(drafter.config).items()}
