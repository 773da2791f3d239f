"""The benchmark of targets with states: each pass is compared with the text of transformers' generate."""

import pytest

pytest.importorskip("transformers")

import transformers  # noqa: E402

from bench import states, timing  # noqa: E402
from dflash_decode.model.hf import HFTarget  # noqa: E402
from tests.support.clocks import Clock  # noqa: E402

TINY = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "num_attention_heads": 4}


def test_every_figure_is_the_time_of_one_pass(monkeypatch):
    clock, forward = Clock(), transformers.Lfm2Model.forward

    def timed(*args, **kwargs):
        clock.work(1.0)
        return forward(*args, **kwargs)

    monkeypatch.setattr(transformers.Lfm2Model, "forward", timed)
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    row = states.rows_of("LFM2", 2, **TINY)
    assert {name: value for name, value in row.items() if name.endswith("_ms")} == dict.fromkeys(
        ("generate_ms", "one_ms", "block_8_ms", "block_4_ms", "block_1_ms"), 1000.0)


def test_another_text_is_an_error():
    run = states.Passes(HFTarget(states.made("LFM2", **TINY)), 64)
    prompt = list(range(16))
    text = [run(0, prompt)[-1]]
    while len(text) < 12:
        text += run(15 + len(text), text[-1:])
    states.Steps(run, prompt, text, 8, 4)()
    text[2] = (text[2] + 1) % 97
    with pytest.raises(AssertionError, match="another text than generate's"):
        states.Steps(run, prompt, text, 8, 4)()
