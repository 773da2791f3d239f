"""Many requests at once: none is lost, none changes another, and those whose clients leave end."""

import asyncio
import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import sleep

import openai
import pytest

from dflash_decode import LLM
from dflash_serve import reading
from tests.support.serving import BATCH, request, serving, until

COUNT = 16


def fields(i):
    how = [{}, {"temperature": 0.9, "seed": i}, {"temperature": 1.5, "top_p": 0.9, "seed": i, "stop": "a"}][i % 3]
    return {"messages": [{"role": "user", "content": f"question {i} " + "x" * (40 * i)}], "max_tokens": 5 + 3 * i} | how


def is_idle(server, llm):
    return (server.desk.taken, server.desk._open, llm.workload().running, llm.workload().waiting) == (0, set(), 0, 0)


def test_sixteen_at_once_some_of_whom_leave(server, llm):
    alone = [llm.chat(**fields(i)).text for i in range(COUNT)]

    async def one(client, i):
        asked = fields(i) | {"model": "tiny"}
        if i % 8 == 3:  # leaves in the middle of a stream
            stream = await client.chat.completions.create(stream=True, **asked | {"max_tokens": 500})
            await anext(aiter(stream))
            return await stream.close()
        if i % 8 == 6:  # leaves before the answer
            waits = asyncio.ensure_future(client.chat.completions.create(**asked | {"max_tokens": 500}))
            await asyncio.sleep(0.05)
            waits.cancel()
            return None
        if i % 2:
            stream = await client.chat.completions.create(stream=True, **asked)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return (await client.chat.completions.create(**asked)).choices[0].message.content

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(COUNT)))

    found = asyncio.run(all_of_them())
    assert found == [None if i % 8 in (3, 6) else text for i, text in enumerate(alone)]
    until(lambda: is_idle(server, llm))


@contextmanager
def held(llm):
    """The decoder waits, until the event that this gives is set."""
    go = threading.Event()
    threading.Thread(target=llm._engine.call, args=(go.wait,)).start()
    try:
        yield go
    finally:
        go.set()


def test_a_full_queue_is_told_to_try_again_and_frees_its_places(llm):
    with serving(llm, max_queue=2) as server, ThreadPoolExecutor(COUNT) as pool, held(llm) as go:
        asked = {"prompt": "abc", "max_tokens": 3}
        waiting = [pool.submit(request, server.url, "POST", "/v1/completions", asked) for _ in range(BATCH + 1)]
        until(lambda: server.desk.taken == BATCH + 1)
        status, headers, text = request(server.url, "POST", "/v1/completions", asked | {"n": 2}, timeout=10.0)
        assert status == 429 and headers["retry-after"] == "1"
        assert json.loads(text)["error"] == {
            "message": f"the server is busy: {BATCH + 1} answers run or wait; try again", "type": "rate_limit_error",
            "param": None, "code": "queue_full"}
        status, _, text = request(server.url, "POST", "/v1/completions", asked | {"n": BATCH + 3})
        assert status == 400 and json.loads(text)["error"]["param"] == "n"
        assert f"n must be at most the {BATCH + 2} answers that this server has room for; got {BATCH + 3}" in text
        last = pool.submit(request, server.url, "POST", "/v1/completions", asked)  # there is room for one
        until(lambda: server.desk.taken == BATCH + 2)
        go.set()
        texts = {json.loads(one.result()[2])["choices"][0]["text"] for one in [*waiting, last]}
        assert texts == {llm.generate("abc", max_tokens=3).text}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY") as client:
            assert client.completions.create(model="tiny", prompt="abc", n=BATCH + 2).usage.completion_tokens
        until(lambda: is_idle(server, llm))


def opened(server, body):
    """The connection of a request whose answer is not read."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def test_a_client_that_leaves_ends_its_answers_running_or_waiting(server, llm):
    def aborted():
        text = request(server.url, "GET", "/metrics")[2]
        return sum(float(line.split()[-1]) for line in text.splitlines()
                   if line.startswith("vllm:request_success_total") and 'finished_reason="abort"' in line)

    before = aborted()
    connections = [opened(server, {"prompt": ["abc", "abd"], "max_tokens": 900, "stream": stream, "logit_bias": {
        str(llm.tokenizer.eos_id): -100}}) for stream in (False, True, False)]
    until(lambda: llm.workload().running == BATCH and server.desk.taken == 6)
    for connection in connections:
        connection.close()
    until(lambda: is_idle(server, llm))
    assert aborted() == before + 6


def test_a_client_that_leaves_before_its_prompt_is_read_leaves_nothing(server, llm, monkeypatch):
    reached, go, real = threading.Event(), threading.Event(), reading.prompts

    def prompts(*arguments):
        reached.set()
        go.wait()
        return real(*arguments)

    monkeypatch.setattr(reading, "prompts", prompts)
    connection = opened(server, {"prompt": "abc", "max_tokens": 900})
    try:
        reached.wait()
        assert request(server.url, "GET", "/health", timeout=5.0)[0] == 200  # the event loop is not what reads
    finally:
        connection.close()
        go.set()
    until(lambda: is_idle(server, llm))


def test_an_answer_that_fails_is_told_and_disturbs_nobody(server, client, llm, script):
    script("broken", None)
    want = llm.generate("sound", max_tokens=60).text
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(client.completions.create, model="tiny", prompt="sound", max_tokens=60)
        for stream in (False, True):
            with pytest.raises(openai.APIError, match="the answer could not be finished: grammar: KeyError: 'no'"):
                list(client.completions.create(model="tiny", prompt="broken", stream=stream))
        several = client.completions.with_raw_response
        with pytest.raises(openai.InternalServerError):
            several.create(model="tiny", prompt=["sound", "broken"], max_tokens=900)
        assert good.result().choices[0].text == want
    until(lambda: is_idle(server, llm))


def test_the_end_waits_for_answers_and_tells_those_that_take_longer(llm):
    with serving(llm, patience=0.0) as server, ThreadPoolExecutor(2) as pool, openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0, timeout=20.0) as client:
        stream = client.completions.create(model="tiny", prompt="abc", max_tokens=900, stream=True,
                                           logit_bias={str(llm.tokenizer.eos_id): -100})
        next(stream)
        with held(llm):
            whole = pool.submit(request, server.url, "POST", "/v1/completions", {"prompt": "abc"}, timeout=20.0)
            until(lambda: server.desk.taken == 2)
            server.should_exit = True
            with pytest.raises(openai.APIError, match="the server stopped before the answer ended"):
                list(stream)
            status, _, text = whole.result()
            assert status == 503 and json.loads(text)["error"]["type"] == "server_error"
    until(lambda: is_idle(server, llm))
    with serving(llm) as server, ThreadPoolExecutor(1) as pool:
        with held(llm):
            whole = pool.submit(request, server.url, "POST", "/v1/completions", {"prompt": "abc", "max_tokens": 90})
            until(lambda: server.desk.taken == 1)
            server.should_exit = True
            until(lambda: not server.servers[0].is_serving())
            for _ in range(9):  # the event loop goes on
                assert server.desk.taken == 1
                sleep(0.01)
        assert json.loads(whole.result()[2])["choices"][0]["text"] == llm.generate("abc", max_tokens=90).text
    until(lambda: is_idle(server, llm))


def test_a_decoder_that_has_ended_is_unhealthy(files):
    with LLM(*files, max_batch=1) as llm, serving(llm) as server:
        assert request(server.url, "GET", "/health")[0] == 200
        llm.close()
        for method, path, body in (("GET", "/health", None), ("POST", "/v1/completions", {"prompt": "abc"})):
            status, _, text = request(server.url, method, path, body)
            assert status == 503 and json.loads(text)["error"]["message"].startswith("the decoder has ended")
        assert server.desk.taken == 0
