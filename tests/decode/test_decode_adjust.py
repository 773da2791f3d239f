"""Penalties, biases and grammars: logits are adjusted before a draft is accepted."""

import dataclasses

import pytest
import torch

from dflash_decode import adjust
from dflash_decode.requests import Request
from dflash_decode.sampling import GREEDY, SamplingParams
from dflash_kernels.reference import sample as reference

pytest.importorskip("transformers")
from tests.support.decode_models import VOCAB, make_target  # noqa: E402
from tests.support.decode_runs import PROMPTS, Oracle, run  # noqa: E402
from tests.support.sampled_runs import SAMPLINGS, requests, texts, without_drafter  # noqa: E402

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
        adjuster = adjust.Adjuster(torch.zeros(1, 4, VOCAB))
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
