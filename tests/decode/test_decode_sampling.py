"""Sampled requests in the loop: a seed's text is baseline sampling's, drawn drafts keep the distribution, greedy
neighbours keep their text."""

import dataclasses
import random
from collections import Counter

import pytest
import torch

from bench import sampling_distribution as sampling_texts  # noqa: E402
from dflash_decode import adjust
from dflash_decode.loop import Decoder
from dflash_decode.model import drafter as draft
from dflash_decode.model.drafter import Drafter, DraftPass
from dflash_decode.requests import Request
from dflash_decode.sampling import GREEDY, SamplingParams
from dflash_decode.verify import AdjustedVerifier, GreedyVerifier, SampledVerifier
from dflash_kernels import StepGraph
from dflash_kernels.reference import sample as reference

pytest.importorskip("transformers")
from tests.decode.test_decode_lossless import DTYPES  # noqa: E402
from tests.support.decode_models import VOCAB, make_target  # noqa: E402
from tests.support.decode_runs import PROMPTS, Oracle, run  # noqa: E402

SAMPLINGS = [
    SamplingParams(0.8, seed=1),
    GREEDY,
    SamplingParams(1.3, top_k=20, seed=2),
    SamplingParams(0.7, top_p=0.9, seed=3),
    SamplingParams(1.0, min_p=0.05, seed=4),
    GREEDY,
    SamplingParams(1.0, 30, 0.95, 0.01, 5),
    SamplingParams(2.0, seed=1),
]


def requests(samplings=SAMPLINGS, n=24):
    return [Request(i, p, n - i % 3, (), s) for i, (p, s) in enumerate(zip(PROMPTS, samplings, strict=True))]


def texts(found):
    return {key: value[:2] for key, value in found.items()}


def without_drafter(target, wanted):
    """Each request alone, token by token."""
    return texts(run(target, None, wanted, max_batch=1, max_context=80))


@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sampled_text_is_baseline_sampling_whatever_drafts_block_batch_and_order(family, dtype):
    _, target = make_target(family, dtype)
    wanted = requests()
    baseline = without_drafter(target, wanted)
    known = {key: text for key, (text, _) in baseline.items()}
    assert baseline[1] != baseline[0] and len({tuple(text) for text in known.values()}) == len(known)
    for width in range(2, 9):
        dice = random.Random(width)
        for drafter in (Drafter.random(target, num_layers=2), Oracle.knowing(target, known, 0.25, 8, width)):
            mixed = dice.sample(wanted, len(wanted))
            got = run(target, drafter, mixed, max_batch=dice.choice([1, 3, 8]), max_context=80, block_size=width,
                      rule=dice.choice(["token", "block"]))
            assert texts(got) == baseline
    assert max(n for *_, lengths in got.values() for n in lengths) == 8


def test_p27_each_token_is_drawn_by_hand():
    """From transformers' logits, with the random number of (seed, position), the first token's position being the
    prompt's length."""
    model, target = make_target("llama")
    s = SamplingParams(0.7, 30, 0.95, 0.01, 5)
    got = without_drafter(target, [Request(i, p, 8, (), s) for i, p in enumerate(PROMPTS[:4])])
    one = {name: torch.tensor([getattr(s, name)]) for name in ("top_k", "top_p", "min_p")}
    for i, prompt in enumerate(PROMPTS[:4]):
        text = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                distribution = reference.distribution(
                    model(torch.tensor([text])).logits[:, -1:], torch.tensor([s.temperature]), **one
                )
            u = reference.uniform(torch.tensor([s.seed]), torch.tensor([[len(text)]]), reference.SAMPLE)
            text.append(int(reference.draw(distribution, u)))
        assert got[i][0] == text[len(prompt):]


def test_a_seed_is_a_text_and_another_seed_another():
    _, target = make_target("llama")
    prompts = {seed: Request(seed, [5, 6], 20, (), SamplingParams(1.0, seed=seed)) for seed in (0, 1, 2**32, 2**63 - 1)}
    baseline = without_drafter(target, prompts.values())
    assert len({tuple(text) for text, _ in baseline.values()}) == 4
    assert without_drafter(target, [dataclasses.replace(prompts[1], prompt=[5, 6])])[1] == baseline[1]


def test_p26_greedy_requests_beside_sampled_ones_keep_their_text():
    """Their text is that of a batch with no logits in memory."""
    _, target = make_target("qwen3", torch.bfloat16)
    greedy = without_drafter(target, requests([GREEDY] * 8))
    known = {key: text for key, (text, _) in greedy.items()}
    for sample_from, drafter in (("greedy", Oracle.knowing(target, known, 0.3)),
                                 ("request", Drafter.random(target, num_layers=2, block_size=5))):
        got = texts(run(target, drafter, requests(), max_batch=8, max_context=80, sample_from=sample_from))
        assert {i: got[i] for i in (1, 5)} == {i: greedy[i] for i in (1, 5)}


def test_a_batch_takes_the_least_that_it_needs():
    _, target = make_target("llama")
    adjusted = Request(2, [3], 4, (), SamplingParams(logit_bias={5: 1.0}))
    for wanted, kinds in (([Request(0, [1], 4), Request(1, [2], 4)], {GreedyVerifier}),
                          ([Request(0, [1], 2), Request(1, [2], 6, (), SAMPLINGS[0])], {SampledVerifier}),
                          ([Request(0, [1], 6), Request(1, [2], 3, (), SAMPLINGS[0])],
                           {SampledVerifier, GreedyVerifier}), ([Request(0, [1], 4), adjusted], {AdjustedVerifier})):
        decoder = Decoder(target, None, max_context=32)
        list(decoder.stream(wanted))
        assert {kind for _, kind in decoder._steps} == kinds


def test_a_fresh_seed_is_told_and_gives_the_text_again():
    _, target = make_target("llama")
    decoder = Decoder(target, None, max_context=80)
    events = list(decoder.stream(Request(i, [7, 8], 20, (), SamplingParams(1.5)) for i in range(2)))
    seeds = {event.id: event.seed for event in events}
    assert seeds[0] != seeds[1] and all(event.seed == seeds[event.id] for event in events)
    for i, seed in seeds.items():
        text = [token for event in events if event.id == i for token in event.tokens]
        assert without_drafter(target, [Request(0, [7, 8], 20, (), SamplingParams(1.5, seed=seed))])[0][0] == text
    assert all(event.seed is None for event in decoder.stream([Request(0, [1], 3)]))


def test_p20_replayed_sampled_steps_are_live_steps(monkeypatch):
    _, target = make_target("llama", torch.bfloat16)
    drafter = Drafter.random(target, num_layers=2, block_size=5)
    for options in ({}, {"sample_from": "request"}, {"sample_from": "request", "rule": "block"}):
        replayed = run(target, drafter, requests(), max_batch=5, max_context=80, **options)
        with monkeypatch.context() as patch:
            patch.setattr(StepGraph, "available", staticmethod(lambda device="cpu": False))
            assert run(target, drafter, requests(), max_batch=5, max_context=80, **options) == replayed


def test_transformers_targets_sample():
    from tests.decode import test_decode_hf as hf
    for kind in ("llama", "gemma2"):
        target = hf.HFTarget(hf.make(kind))
        wanted = [Request(i, p, 12, (), s) for i, (p, s) in enumerate(zip(hf.PROMPTS, SAMPLINGS, strict=False))]
        baseline = texts(run(target, None, wanted, max_batch=1, max_context=128))
        got = run(target, Drafter.random(target, num_layers=2, block_size=5), wanted, max_batch=3, max_context=128)
        assert texts(got) == baseline
        logits, ids = torch.zeros(7, VOCAB), torch.zeros(7, dtype=torch.int64)
        rows = torch.randn(7, target.hidden_size)
        target.logits(rows, logits)
        target.next_ids(rows, ids, torch.zeros(7))
        assert torch.equal(logits.argmax(-1), ids)


# ---- drafts drawn from the drafter's distribution
# ---------------------------------------------------------------------------

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
        (step,) = decoder._steps.values()
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


# ---- adjusted logits -----------------------------------------------------------------------------------------------

PENALTIES = SamplingParams(repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.5,
                     logit_bias={11: 3.0, 12: -2.5})


class Ascending:
    """A token is larger than the one before it, unless that was the largest: then anything."""

    def fill_bitmask(self, tokens, words):
        last = tokens[-1] if tokens and tokens[-1] < VOCAB - 1 else -1
        words.copy_(adjust.pack_bits(torch.arange(VOCAB) > last))


def by_hand(model, prompt, n, s):
    """Greedy decoding with penalties, token by token."""
    text = []
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text]])).logits[0, -1]
        for token in {*prompt, *text}:
            logits[token] = logits[token] / s.repetition_penalty if logits[token] > 0 else \
                logits[token] * s.repetition_penalty
        for token in set(text):
            logits[token] -= s.presence_penalty + s.frequency_penalty * text.count(token)
        for token, bias in s.logit_bias.items():
            logits[token] += bias
        text.append(int(logits.argmax()))
    return text


def test_penalties_and_biases_are_those_by_hand():
    model, target = make_target("llama")
    baseline = without_drafter(target, requests([PENALTIES] * 8))
    changed = without_drafter(target, requests([GREEDY] * 8))
    for i, prompt in enumerate(PROMPTS):
        assert baseline[i][0] == by_hand(model, prompt, 24 - i % 3, PENALTIES) != changed[i][0]


@pytest.mark.parametrize("fault", [False, True])
def test_p38_a_row_is_adjusted_by_the_drafts_before_it(fault, monkeypatch):
    _, target = make_target("llama", torch.bfloat16)
    hot = dataclasses.replace(PENALTIES, temperature=0.8, seed=5)
    grammar = SamplingParams(1.0, seed=6, grammar=Ascending())
    wanted = requests([PENALTIES, hot, grammar, GREEDY, SAMPLINGS[0], hot, grammar, PENALTIES])
    baseline = without_drafter(target, wanted)
    known = {key: text for key, (text, _) in baseline.items()}
    for i in (2, 6):
        assert all(b > a or a == VOCAB - 1 for a, b in zip(known[i], known[i][1:], strict=False))
    if fault:
        right = adjust.Adjuster.fill
        monkeypatch.setattr(adjust.Adjuster, "fill", lambda self, b, s, prompt, text, drafts, stops: right(
            self, b, s, prompt, text, drafts[:1] * len(drafts), stops))
    got = texts(run(target, Oracle.knowing(target, known, 0.2), wanted, max_batch=8, max_context=80))
    assert (got == baseline) != fault
    assert all(got[i] == baseline[i] for i in (3, 4))


@pytest.mark.parametrize("hole", [-1, VOCAB, 2**40])
def test_rows_behind_a_draft_that_is_no_token_are_adjusted_for_nothing(hole):
    """It is nobody's last token: -1 had marked the vocabulary's, and VOCAB ended the step."""
    settings, found = dataclasses.replace(PENALTIES, grammar=Ascending()), []
    for drafts in ([3, hole, 5], [3]):
        adjuster = adjust.Adjuster(1, 4, VOCAB, torch.device("cpu"))
        adjuster.fill(0, settings, [1, 2], [4], drafts)
        a = adjuster.adjustments
        found.append([t[:, :2] for t in (a.seen, a.bias, a.bitmask)] + [a.seen[:, 2:], a.bias[:, 2:]])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_grammar_is_not_asked_what_follows_a_stop_token():
    """A matcher that has ended raises when it is asked again, and that would end everybody's step."""
    _, target = make_target("llama")
    prompt = PROMPTS[0]
    text = without_drafter(target, [Request(0, prompt, 12, (), SamplingParams(1.0, seed=6))])[0][0]
    stop = next(token for i, token in enumerate(text) if 2 <= i <= 5 and token not in text[:i])
    asked = []

    class Anything:
        def fill_bitmask(self, tokens, words):
            assert stop not in tokens
            asked.append(len(tokens))

    wanted = [Request(0, prompt, 40, (stop,), SamplingParams(1.0, seed=6, grammar=Anything()))]
    known = {0: text + [1] * 30}
    got = texts(run(target, Oracle.knowing(target, known, 0.0), wanted, max_batch=1, max_context=80))
    assert got[0][0] == text[:text.index(stop) + 1] and asked


def test_bits_are_packed_as_the_op_reads_them():
    mask = torch.rand(3, 97) < 0.5
    mask[0, 31] = mask[1, 96] = True
    assert torch.equal(reference.bits(adjust.pack_bits(mask), 97), mask)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "match"),
    [
        (SamplingParams(temperature=-0.1), r"temperature must be a finite number of at least 0; got -0.1"),
        (SamplingParams(temperature=float("nan")), "temperature must be a finite number of at least 0; got nan"),
        (SamplingParams(temperature="hot"), "temperature must be a finite number of at least 0; got 'hot'"),
        (SamplingParams(top_p=1.5), "top_p must be a finite number from 0 to 1; got 1.5"),
        (SamplingParams(min_p=-1), "min_p must be a finite number from 0 to 1; got -1"),
        (SamplingParams(top_k=-2), r"top_k must be an integer, -1 or 0 \(off\), or up to 2\*\*31 - 1; got -2"),
        (SamplingParams(top_k=2.0), "top_k must be an integer"),
        (SamplingParams(seed=2**63), "seed must be an integer from 0 to"),
        (SamplingParams(seed=True), "seed must be an integer"),
        (SamplingParams(repetition_penalty=0), "repetition_penalty must be a finite number above 0; got 0"),
        (SamplingParams(presence_penalty=float("inf")), "presence_penalty must be a finite number; got inf"),
        (
            SamplingParams(presence_penalty=-1e308),
            r"presence_penalty must be a finite number from -3.40282e\+38 to 3.402",
        ),
        (
            SamplingParams(frequency_penalty=1e308),
            r"frequency_penalty must be a finite number from -3.40282e\+38 to 3.4",
        ),
        (
            SamplingParams(temperature=1e308),
            r"temperature must be a finite number of at least 0, at most 3.40282e\+38; got 1e",
        ),
        (SamplingParams(logit_bias={VOCAB: 1.0}), rf"logit_bias must be for token ids in \[0, {VOCAB}\); got {VOCAB}"),
        (
            SamplingParams(logit_bias={3: "much"}),
            "logit_bias must be numbers that float32 can hold; got 'much' for token 3",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(sampling, match):
    _, target = make_target("llama")
    decoder = Decoder(target, None, max_context=32)
    with pytest.raises(ValueError, match=f"request 'x': {match}"):
        decoder.submit(Request("x", [1], 2, (), sampling))
    with pytest.raises(TypeError, match="request 'x': sampling must be a SamplingParams; got 0.7"):
        decoder.submit(Request("x", [1], 2, (), 0.7))


@pytest.mark.parametrize("options", [{"rule": "row"}, {"sample_from": "target"}])
def test_rules_and_sources_are_checked(options):
    _, target = make_target("llama")
    with pytest.raises(ValueError, match=f"Decoder: {next(iter(options))} must be one of"):
        Decoder(target, None, max_context=32, **options)
