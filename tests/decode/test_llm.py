"""`LLM`: the answers are the decoder's, whoever asks, from wherever, with or without a drafter."""

import warnings

import numpy as np
import pytest
import torch

from dflash_decode import LLM, GenerationError, GenerationParams, SamplingParams, Session
from dflash_decode.lossless import _next_logits
from tests.support import tiny

EOS = tiny.VOCAB - 1
SETTINGS = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.5, "top_k": 40, "seed": 2, "frequency_penalty": 0.3}]


@pytest.fixture(scope="module")
def llm(models):
    with LLM(models["model"], models["draft"], max_batch=3, dtype="float32") as made:
        yield made


@pytest.fixture(scope="module")
def baseline(llm):
    with llm.without_drafter() as made:
        yield made


@pytest.fixture(scope="module")
def session(llm):
    return llm.session


def tokens(found):
    return found.token_ids


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_an_answer_is_that_of_the_decoder_and_of_the_baseline(llm, baseline, session, how):
    """Of a session's run, on which the command line's promises are proven."""
    want = session.run("hello", max_tokens=24, sampling=SamplingParams(**how)).answers[0]
    for each in (llm, baseline):
        found = each.chat("hello", max_tokens=24, **how)
        assert (found.text, found.token_ids, found.finish_reason) == (want.text, want.tokens, want.finish)
        assert "".join(each.stream([{"role": "user", "content": "hello"}], max_tokens=24, **how)) == want.text
    assert baseline.chat("hello", max_tokens=9).steps == (1,) * 8
    assert sum(llm.chat("hello", max_tokens=9, **how).steps) == 8


def test_a_text_is_continued_and_a_message_answered(llm):
    ids = llm.tokenizer.encode("hello")
    asked = [{"role": "user", "content": "hello"}]
    want = llm.generate(ids, max_tokens=6)
    assert want.prompt_token_ids == ids
    for same in ("hello", np.array(ids), torch.tensor([ids])):
        assert llm.generate(same, max_tokens=6).token_ids == want.token_ids
    templated = llm.tokenizer.encode("<u>hello<a>")
    assert [found.prompt_token_ids for found in (llm.chat("hello"), llm.chat(asked), llm.generate(asked))] == \
        [templated] * 3
    assert templated != ids
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    joined = llm.chat("he\nllo", max_tokens=1).prompt_token_ids  # as vLLM joins them
    assert llm.chat([{"role": "user", "content": parts}], max_tokens=1).prompt_token_ids == joined
    assert asked == [{"role": "user", "content": "hello"}] and len(parts) == 2


def test_several_prompts_have_an_answer_each_and_parameters_of_their_own(llm):
    each = [GenerationParams(max_tokens=3), SamplingParams(temperature=1.0, seed=3), GenerationParams(max_tokens=5)]
    found = llm.generate(["a", [98, 99], "c"], each, max_tokens=4)
    assert [len(one.token_ids) for one in found] == [4, 4, 4] and [one.seed for one in found] == [None, 3, None]
    alone = [llm.generate(prompt, how, max_tokens=4) for prompt, how in zip(["a", [98, 99], "c"], each, strict=True)]
    assert list(map(tokens, alone)) == list(map(tokens, found))
    assert isinstance(llm.generate(["a"], max_tokens=1), list) and llm.generate([]) == []


def test_templates_get_what_they_are_told(models, tmp_path):
    folder = tiny.write_target(tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<a>{%", "<a>{{ mood }}{{ tools | length if tools else '' }}{%"))
    with LLM(folder, "none") as llm:
        found = llm.chat("x", max_tokens=1, chat_template_kwargs={"mood": "calm"}, tools=[{"type": "function"}])
        assert llm.tokenizer.decode(found.prompt_token_ids, False) == "<u>x<a>calm1"
        found = llm.submit([{"role": "user", "content": "x"}], max_tokens=1, chat_template_kwargs={"mood": "odd"})
        assert llm.tokenizer.decode(found.result().prompt_token_ids, False) == "<u>x<a>odd"


def test_n_answers_have_seeds_of_their_own(llm):
    found = llm.chat("hi", n=3, temperature=1.0, seed=2**63 - 1, max_tokens=8)
    assert [one.seed for one in found.choices] == [2**63 - 1, 0, 1] and found.choices[0] is found
    assert [one.token_ids for one in found.choices] == [
        llm.chat("hi", temperature=1.0, seed=seed, max_tokens=8).token_ids for seed in (2**63 - 1, 0, 1)]
    fresh = llm.chat("hi", n=2, temperature=1.0, max_tokens=8)
    assert fresh.seed != fresh.choices[1].seed
    assert llm.chat("hi", temperature=1.0, max_tokens=8, seed=fresh.seed).token_ids == fresh.token_ids


# ---- what ends an answer -----------------------------------------------------------------------------------------


def test_stop_tokens(llm):
    whole = llm.generate("abc", max_tokens=12)
    end = whole.token_ids[4]
    at = whole.token_ids.index(end)
    found = llm.generate("abc", max_tokens=12, stop_token_ids=[end])
    assert found.token_ids == whole.token_ids[:at + 1] and (found.finish_reason, found.stop_reason) == ("stop", end)
    assert found.text == llm.tokenizer.decode(whole.token_ids[:at])
    assert whole.finish_reason == "length" and whole.stop_reason is None


def test_the_model_s_own_stop_token_is_heeded_ignored_or_put_off(llm, baseline):
    always = {"logit_bias": {EOS: 1e4}, "max_tokens": 9}
    for each in (llm, baseline):
        assert each.generate("abc", **always).token_ids == [EOS] and each.generate("abc", **always).text == ""
        assert each.generate("abc", **always).finish_reason == "stop"
        assert each.generate("abc", **always).stop_reason is None  # vLLM's sign for the model's own
        assert each.generate("abc", ignore_eos=True, stop_token_ids=[EOS], **always).stop_reason == EOS
        assert each.generate("abc", ignore_eos=True, **always).token_ids == [EOS] * 9
        later = each.generate("abc", min_tokens=4, **always)
        assert later.token_ids[4:] == [EOS] and EOS not in later.token_ids[:4] and later.finish_reason == "stop"
        assert later.token_ids[:4] == each.generate("abc", max_tokens=4, logit_bias={EOS: -np.inf}).token_ids
    text = llm.generate("abc", max_tokens=9).text
    assert llm.generate("abc", max_tokens=9, min_tokens=9, stop=text[:2]).text == text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_string_ends_the_text_before_it(llm, baseline, temperature):
    letters = {llm.tokenizer.token_id(letter): 30.0 for letter in "abcdefghijklmnopqrstuvwxyz"}
    how = {"temperature": temperature, "seed": 3, "logit_bias": letters, "frequency_penalty": 20.0}
    whole = llm.generate("abc", max_tokens=24, **how)
    characters = whole.text
    assert len(characters) == 24 and characters.isalpha() and characters.index(characters[5:8]) == 5
    for stop in (characters[5:8], [characters[5:8], characters[4:9]], [characters[7], "never there"]):
        first = min(characters.index(one) + len(one) for one in ([stop] if isinstance(stop, str) else stop)
                    if one in characters)
        for each in (llm, baseline):
            stream = each.submit("abc", max_tokens=24, stop=stop, logprobs=0, **how)
            chunks = list(stream)
            pieces, found = [chunk.text for chunk in chunks], stream.result()
            assert [one.token for chunk in chunks for one in chunk.logprobs] == found.token_ids
            assert [one.token for one in found.logprobs] == found.token_ids
            assert "".join(pieces) == found.text and (found.finish_reason == "stop") == (found.stop_reason in stop)
            assert characters[:first] == found.text + found.stop_reason
            assert found.token_ids == whole.token_ids[:len(found.token_ids)]
            assert sum(found.steps) < len(found.token_ids) + 4  # nothing is decoded after the step that completed it
            assert found.stop_reason not in llm.tokenizer.decode(found.token_ids[:-1])
    assert llm.generate("abc", max_tokens=24, stop="never there", **how).text == whole.text
    for least in range(10):  # as in vLLM, one that ends behind the least tokens counts, wherever it begins
        text = llm.generate("abc", max_tokens=24, stop=characters[5:8], min_tokens=least, **how).text
        assert text == (characters[:5] if least < 8 else characters)


def test_the_end_of_the_context_ends_an_answer_and_who_named_a_length_is_told(models):
    with LLM(models["model"], "none", max_context=16) as made:
        prompt, no_end = [5] * 10, {"logit_bias": {EOS: -np.inf}}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(made.generate(prompt, max_tokens=6, **no_end).token_ids) == 6
            found = made.generate(prompt, **no_end)  # 256 by default, which nobody named
            assert (len(found.token_ids), found.finish_reason, found.stop_reason) == (6, "length", None)
        words = "^max_tokens is 7, but the context of 16 tokens has room for 6 after the prompt: .* 'length'$"
        with pytest.warns(UserWarning, match=words):
            assert made.generate(prompt, max_tokens=7, **no_end).token_ids == found.token_ids


# ---- log probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_log_probabilities_are_the_target_s(llm, baseline, session, how):
    found = llm.chat("hello", max_tokens=8, logprobs=3, **how)
    assert found.logprobs == baseline.chat("hello", max_tokens=8, logprobs=3, **how).logprobs
    assert [one.token for one in found.logprobs] == found.token_ids
    assert found.token_ids == llm.chat("hello", max_tokens=8, **how).token_ids
    check_logprobs(session, found)
    if not how:
        assert all(one.top[0] == (one.token, one.logprob, one.text) for one in found.logprobs)
    for one in found.logprobs:
        assert [one.text, *(top.text for top in one.top)] == [
            llm.tokenizer.decode([token], False) for token in (one.token, *(top.token for top in one.top))]
    assert [one.top for one in llm.chat("hello", max_tokens=2, logprobs=0).logprobs] == [(), ()]


def test_log_probabilities_of_whole_blocks(models, session):
    """Of the steps that a GPU and transformers' layers have too."""
    with LLM(models["model"], models["draft"], dtype="float32", sample_from="request", max_batch=2) as drawn:
        pair = [drawn.submit("hello", max_tokens=20, logprobs=3, temperature=50.0, seed=seed) for seed in (1, 2)]
        for stream in pair:
            check_logprobs(session, found := stream.result())
            assert [one.token for one in found.logprobs] == found.token_ids and max(found.steps) > 1


def check_logprobs(session, found):
    text = list(found.prompt_token_ids)
    for one in found.logprobs:
        want = _next_logits(session.target, text).log_softmax(-1)
        assert one.logprob == pytest.approx(float(want[one.token]), abs=1e-5)
        best = want.topk(3)
        assert [top.token for top in one.top] == best.indices.tolist()
        assert [top.logprob for top in one.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        text.append(one.token)


def test_nobody_else_pays_for_log_probabilities(llm, monkeypatch):
    monkeypatch.setattr("dflash_decode.loop.logprobs_of", None)
    assert llm.chat("hello", max_tokens=5).logprobs is None
    with pytest.raises(GenerationError, match="'NoneType' object is not callable"):
        llm.chat("hello", max_tokens=5, logprobs=1)


def test_memory_and_threads_are_those_of_the_session(llm, baseline):
    assert baseline.session is llm.session and baseline._decoder.target is llm._decoder.target
    assert isinstance(llm.session, Session) and llm.max_context == tiny.CONTEXT
