"""DFLASH_CHECK=1: every step's values are checked, and no text changes."""

import pytest
import torch

from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.sampling import SamplingParams
from tests.support.decode_runs import collect, random_target, requests

SAMPLINGS = [SamplingParams(), SamplingParams(0.8, seed=3, top_k=20), SamplingParams(logit_bias={3: 1.0})]


def decoder_of():
    target = random_target("qwen3", torch.float32, "cpu", layers=2)
    return Decoder(target, Drafter.random(target, num_layers=1, block_size=4), max_batch=4, max_context=64, page_size=4,
                   prefill_rows=16)


def asked():
    lens = (1, 2, 13, 9, 5, 7, 3, 8)
    return [type(r)(r.id, r.prompt, r.max_tokens, (), SAMPLINGS[r.id % 3]) for r in requests(lens)]


def test_texts_are_the_same_while_values_are_checked(monkeypatch):
    def texts(decoder):
        return {key: (text, finish) for key, (text, finish, _) in collect(decoder.stream(asked())).items()}

    baseline = texts(decoder_of())
    assert {finish for _, finish in baseline.values()} == {"length"}
    monkeypatch.setenv("DFLASH_CHECK", "1")
    decoder = decoder_of()
    decoder.warm_up()
    assert texts(decoder) == baseline
    assert all(stage.work.graph is None for stage in decoder.runner.verifies.values())


@pytest.mark.parametrize("width", [None, 4])
def test_no_draft_goes_past_the_end_of_the_context(width, monkeypatch):
    target = random_target("qwen3", torch.float32, "cpu", layers=2)
    drafter, asked = Drafter.random(target, num_layers=1, block_size=4), requests((200,) * 8)[:3]
    monkeypatch.setattr(target, "max_context", 48)
    monkeypatch.setenv("DFLASH_CHECK", "1")
    plain, drafted = ({key: (text, finish) for key, (text, finish, _) in collect(Decoder(
        target, with_it, block_size=width, max_batch=4).stream(asked)).items()} for with_it in (None, drafter))
    assert plain == drafted and {finish for _, finish in plain.values()} == {"length"}


@pytest.mark.parametrize("after", [1, 3])
def test_a_bad_value_is_found_in_every_step(after, monkeypatch):
    monkeypatch.setenv("DFLASH_CHECK", "1")
    decoder = decoder_of()
    decoder.submit(requests((60,) * 8)[1])
    for _ in range(after):
        decoder.step()
    tables = decoder.runner.tables["verify", 1]
    tables.rows[0, 0] = decoder.pool.num_pages
    with pytest.raises(ValueError, match="page_table"):
        decoder.step()
