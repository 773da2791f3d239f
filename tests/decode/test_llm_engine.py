"""`LLM` from threads and event loops, with requests that leave; and what goes wrong in its thread."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from dflash_decode import LLM, GenerationError
from dflash_decode.llm import api

SETTINGS = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.5, "top_k": 40, "seed": 2, "frequency_penalty": 0.3}]


@pytest.fixture(scope="module")
def llm(models):
    with LLM(models["model"], models["draft"], max_batch=3, dtype="float32") as made:
        yield made


# ---- threads and event loops -----------------------------------------------------------------------------------------


def asked(i):
    return f"prompt {i}", {"max_tokens": 3 + i % 9, **SETTINGS[i % 3]}


@pytest.fixture(scope="module")
def alone(llm):
    with llm.without_drafter() as baseline:
        return [baseline.generate(prompt, **how).token_ids for prompt, how in map(asked, range(24))]


def test_answers_in_many_threads_are_as_alone(llm, alone):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: llm.generate(asked(i)[0], **asked(i)[1]).token_ids, range(24)))
    assert found == alone


def test_answers_in_an_event_loop_are_as_alone_though_others_leave(llm, alone):
    async def one(i):
        prompt, how = asked(i)
        if i % 4 == 3:  # leaves after the first piece
            async for _ in llm.astream(prompt, **how | {"max_tokens": 90}):
                return None
        if i % 4 == 2:
            return [token async for chunk in await llm.asubmit(prompt, **how) for token in chunk.token_ids]
        return (await llm.agenerate(prompt, **how)).token_ids

    async def all_of_them():
        found = await asyncio.gather(*map(one, range(24)))
        many = await llm.achat(["a", "b"], max_tokens=2)
        return found, [len(each.token_ids) for each in many]

    found, lengths = asyncio.run(all_of_them())
    assert found == [None if i % 4 == 3 else want for i, want in enumerate(alone)] and lengths == [2, 2]


def test_a_loop_that_is_closed_disturbs_nobody(llm):
    async def leave():
        await llm.asubmit("abc", max_tokens=100)
        return llm.submit("b", max_tokens=12)

    other = asyncio.run(leave())
    assert other.result().token_ids == llm.generate("b", max_tokens=12).token_ids
    assert llm.workload().running == 0


def test_a_stream_that_is_left_frees_its_pages(llm):
    for _ in llm.stream("abc", max_tokens=100):
        break
    stream = llm.submit("abc", max_tokens=100, n=5)  # more than run at once
    next(iter(stream))
    stream.cancel()
    found = stream.result()
    assert {one.finish_reason for one in found.choices} == {"cancelled"} and llm.workload() == (0, 0, 0.0)
    assert 0 < len(found.token_ids) < 100 and found.text == llm.tokenizer.decode(found.token_ids)


@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_that_nobody_has_read_ends_with_its_iterator(llm, closed):
    texts = llm.stream("abc", max_tokens=200, ignore_eos=True)
    if closed:
        texts.close()
        assert list(texts) == []
    else:
        del texts
    llm.generate("abc", max_tokens=2)
    assert llm.workload() == (0, 0, 0.0)


def test_an_interrupt_ends_a_stream_that_something_keeps(llm, monkeypatch):
    texts = llm.stream("abc", max_tokens=200, ignore_eos=True)
    next(texts)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(texts._stream, "_seen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in texts:
            pass
    llm.generate("abc", max_tokens=2)
    assert llm.workload() == (0, 0, 0.0)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_grammar_that_raises_ends_its_answer_alone(llm):
    class Bad:
        def fill_bitmask(self, tokens, words):
            raise KeyError("no")

    good = llm.submit("abc", max_tokens=9)
    with pytest.raises(GenerationError, match="^grammar: KeyError: 'no'$"):
        llm.generate("abc", grammar=Bad())
    assert len(good.result().token_ids) == 9


def test_a_grammar_that_exits_leaves_nobody_waiting(llm):
    class Leaves:
        def fill_bitmask(self, tokens, words):
            raise SystemExit(3)

    with pytest.raises(GenerationError, match="the decoder failed: SystemExit: 3"):
        llm.generate("abc", grammar=Leaves())
    assert len(llm.generate("abc", max_tokens=5).token_ids) == 5


def test_a_thread_that_ends_leaves_nobody_waiting(models, monkeypatch):
    llm = LLM(models["model"], "none")
    monkeypatch.setattr(llm._engine, "_decode", None)
    with pytest.raises(GenerationError, match="the decoder's thread failed: TypeError"):
        llm.generate("abc")
    with pytest.raises(RuntimeError, match="it must be open"):
        llm.generate("abc")


def test_a_step_that_fails_once_is_tried_again_and_one_that_fails_always_ends_all(llm, monkeypatch):
    real, left = llm._decoder.step, [1]

    def step():
        if left[0]:
            left[0] -= 1
            raise OSError("disk")
        return real()

    monkeypatch.setattr(llm._decoder, "step", step)
    want = llm.generate("abc", max_tokens=5).token_ids
    left[0] = 50
    streams = [llm.submit("abc", max_tokens=100) for _ in range(5)]
    for stream in streams:
        with pytest.raises(GenerationError, match="the decoder failed: OSError: disk"):
            stream.result()
    left[0] = 0
    assert llm.generate("abc", max_tokens=5).token_ids == want


def test_text_that_cannot_be_made_ends_its_answer_alone(llm, monkeypatch):
    real = api.Tokenizer.decode

    def decode(self, ids, skip_special_tokens=True):
        if threading.current_thread().name == "dflash-engine" and list(ids):
            raise ValueError("no text")
        return real(self, ids, skip_special_tokens)

    monkeypatch.setattr(api.Tokenizer, "decode", decode)
    with pytest.raises(GenerationError, match="ValueError: no text"):
        llm.generate("abc", max_tokens=90)
    monkeypatch.undo()
    assert len(llm.generate("abc", max_tokens=5).token_ids) == 5


def test_what_is_closed_says_so(models):
    llm = LLM(models["model"], "none", max_batch=1)
    streams = [llm.submit("abc", max_tokens=120) for _ in range(3)]
    llm.close()
    llm.close()
    for stream in streams:
        with pytest.raises(GenerationError, match="the LLM was closed before the answer ended"):
            stream.result()
    with pytest.raises(RuntimeError, match="^LLM: it must be open to generate; got one that is closed$"):
        llm.generate("abc")


def test_an_llm_that_nobody_has_ends_its_thread_and_one_that_streams_goes_on(models):
    def threads():
        return sum(thread.name == "dflash-engine" for thread in threading.enumerate())

    before = threads()
    text = "".join(LLM(models["model"], "none").stream("abc", max_tokens=30))  # an assert would keep what it calls
    assert len(text) > 3
    llm = LLM(models["model"], "none")
    llm.generate("abc", max_tokens=2)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None and threads() == before
