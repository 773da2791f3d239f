"""OpenAI's client against our server: every answer is the one that `LLM` gives alone."""

import json

import pytest

from dflash_bench.metrics import drafting, samples
from dflash_decode import Chunk, Completion
from dflash_serve.metrics import Metrics
from dflash_serve.tools import CallReader
from tests.support.serving import CONTEXT, WEATHER, request

HELLO = [{"role": "user", "content": "hello"}]
# Fields of a request, and what is `LLM`'s of them.
SETTINGS = [
    ({}, {}), ({"temperature": 0.9, "seed": 5, "top_p": 0.9}, None),
    ({"temperature": 1.2, "seed": 2, "presence_penalty": 0.5, "frequency_penalty": 0.3, "stop": ["e", "\n"]}, None),
    ({"logit_bias": {"75": 60.0, "76": 60.0}}, {"logit_bias": {75: 60.0, 76: 60.0}}),
    ({"extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3, "min_tokens": 5, "ignore_eos": True},
      "temperature": 1.0, "seed": 1},
     {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3, "min_tokens": 5, "ignore_eos": True, "temperature": 1.0,
      "seed": 1})]


def ask(client, **fields):
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 24} | fields)


def continued(client, **fields):
    return client.completions.create(**{"model": "tiny", "prompt": "hello", "max_tokens": 24} | fields)


@pytest.mark.parametrize("fields, how", SETTINGS, ids=lambda value: ",".join(value or []))
def test_text_is_that_of_the_model_alone(client, llm, fields, how):
    how = fields if how is None else how
    want = llm.chat(HELLO, max_tokens=24, **how)
    found = ask(client, **fields)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (want.text, want.finish_reason)
    assert found.usage.prompt_tokens == len(want.prompt_token_ids)
    assert found.usage.completion_tokens == len(want.token_ids) > 0
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **fields))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.total_tokens == found.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].choices == []
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == want.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [want.finish_reason]
    want = llm.generate("hello", max_tokens=24, **how)
    assert continued(client, **fields).choices[0].text == want.text
    assert "".join(c.choices[0].text for c in continued(client, stream=True, **fields)) == want.text


def test_n_answers_and_several_prompts(client, llm):
    how = {"temperature": 1.0, "seed": 3}
    want = [one.text for one in llm.chat(HELLO, n=3, max_tokens=9, **how).choices]
    found = ask(client, n=3, max_tokens=9, **how)
    assert [(choice.index, choice.message.content) for choice in found.choices] == list(enumerate(want))
    texts = ["", "", ""]
    for chunk in ask(client, n=3, max_tokens=9, stream=True, **how):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == want
    ids = llm.tokenizer.encode("xyz")
    for prompt in (["hello", "xyz"], [llm.tokenizer.encode("hello"), ids]):
        want = [one.text for each in llm.generate(["hello", ids], n=2, max_tokens=9, **how) for one in each.choices]
        found = continued(client, prompt=prompt, n=2, max_tokens=9, **how)
        assert [choice.text for choice in found.choices] == want and found.usage.prompt_tokens == 5 + 3
        texts = [""] * 4
        for chunk in continued(client, prompt=prompt, n=2, max_tokens=9, stream=True, **how):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == want
    assert continued(client, prompt=ids).choices[0].text == llm.generate(ids, max_tokens=24).text


def test_log_probabilities(client, llm):
    want = llm.chat(HELLO, max_tokens=9, logprobs=2, stop="\u00e9")
    found = ask(client, logprobs=True, top_logprobs=2, max_tokens=9).choices[0].logprobs.content
    chunks = [c.choices[0] for c in ask(client, logprobs=True, top_logprobs=2, max_tokens=9, stream=True)]
    assert [one for c in chunks if c.logprobs for one in c.logprobs.content] == found
    assert [one.logprob for one in found] == [one.logprob for one in want.logprobs]
    assert [[top.logprob for top in one.top_logprobs] for one in found] == [
        [top.logprob for top in one.top] for one in want.logprobs]
    for one, token in zip(found, want.token_ids, strict=True):
        assert one.token == llm.tokenizer.decode([token], False)
        assert one.bytes == (None if "\ufffd" in one.token else list(one.token.encode()))
    found = ask(client, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [one.top_logprobs for one in found] == [[], []]
    long = llm.tokenizer.token_id("<u>")  # a token of several characters
    how = {"max_tokens": 9, "logprobs": 1}
    want = llm.generate("hello", logit_bias={long: 100.0}, **how)
    found = continued(client, logit_bias={str(long): 100.0}, **how).choices[0].logprobs
    assert found.token_logprobs == [one.logprob for one in want.logprobs] and found.tokens == ["<u>"] * 9
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(9)]
    offsets = [at for c in continued(client, logit_bias={str(long): 100.0}, stream=True, **how) for at in (
        c.choices[0].logprobs.text_offset if c.choices[0].logprobs else [])]
    assert offsets == found.text_offset
    assert all(top[token] == value for top, token, value in zip(found.top_logprobs, found.tokens, found.token_logprobs,
                                                                strict=True))


def test_without_a_length_a_chat_may_fill_the_context_and_a_completion_has_16_tokens(client, llm):
    no_end = {"logit_bias": {str(llm.tokenizer.eos_id): -100}}
    found = client.chat.completions.create(model="tiny", messages=HELLO, **no_end)
    assert found.usage.total_tokens == CONTEXT and found.choices[0].finish_reason == "length"
    assert client.completions.create(model="tiny", prompt="hello", **no_end).usage.completion_tokens == 16
    for most in ({}, {"max_tokens": CONTEXT}):  # there is room for fewer, as in vLLM and llama.cpp
        found = client.completions.create(model="tiny", prompt=[5] * (CONTEXT - 7), **most, **no_end)
        assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (7, "length")
    found = client.completions.create(model="tiny", prompt=[[5] * (CONTEXT - 7), [5]], max_tokens=20, **no_end)
    assert found.usage.completion_tokens == 7 + 20
    assert ask(client, max_tokens=9, max_completion_tokens=3).usage.completion_tokens == 3


# ---- what the template sees ------------------------------------------------------------------------------------------


def rendered(llm, messages, **variables):
    return llm.generate(llm.tokenizer.encode(llm.tokenizer.apply_chat_template(messages, **variables)), max_tokens=9)


def test_messages_of_all_kinds_reach_the_template(client, llm):
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    asked = [{"role": "developer", "content": "be brief"},
             {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "one"},
                                                         {"type": "text", "text": "two"}]},
             {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
             {"role": "tool", "tool_call_id": "call 1", "content": "rain"},
             {"role": "assistant", "content": "It rains.", "reasoning_content": "so be it"}]
    read = call | {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    want = rendered(llm, [
        {"role": "system", "content": "be brief"}, {"role": "user", "name": "Ann", "content": "one\ntwo"},
        {"role": "assistant", "content": "", "tool_calls": [read], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call 1", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "so be it"}], mood="calm",
        tools=[WEATHER])
    for said in ("Ann", "call 1", "hm", "so be it"):
        assert said in llm.tokenizer.decode(want.prompt_token_ids)
    found = ask(client, messages=asked, tools=[WEATHER], max_tokens=9,
                extra_body={"chat_template_kwargs": {"mood": "calm"}})
    assert found.usage.prompt_tokens == len(want.prompt_token_ids)
    assert found.choices[0].message.content == want.text
    without = ask(client, messages=asked, tools=[WEATHER], tool_choice="none", max_tokens=1)
    assert without.usage.prompt_tokens < found.usage.prompt_tokens - 50


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
NEXT = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'


def test_calls_of_tools_are_read(client, script):
    script("Köln", f"Let me look. \n{CALL}\n{NEXT}\n")
    asked = {"messages": [{"role": "user", "content": "Köln?"}], "tools": [WEATHER], "max_tokens": 200}
    choice = ask(client, **asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("weather", {"city": "Köln"}), ("weather", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True, **asked)]
    assert "".join(c.delta.content or "" for c in chunks) == "Let me look." and chunks[-1].finish_reason == "tool_calls"
    streamed = [call for c in chunks for call in c.delta.tool_calls or []]
    assert [call.index for call in streamed] == [0, 1]
    assert [(call.function.name, json.loads(call.function.arguments)) for call in streamed] == calls
    assert len(ask(client, parallel_tool_calls=False, **asked).choices[0].message.tool_calls) == 1
    choice = ask(client, **asked | {"tools": []}).choices[0]  # nobody asked for calls
    assert choice.message.content == f"Let me look. \n{CALL}\n{NEXT}\n" and choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


def read(text, size, most=None):
    reader, said, calls = CallReader(most), "", []
    for i in range(0, len(text), size):
        more, found = reader.push(text[i:i + size])
        said, calls = said + more, calls + found
        assert "<tool_call>" not in said or "{" not in CALL
    more, found = reader.flush()
    return said + more, [(call.name, call.arguments) for call in calls + found]


COLOGNE = ("weather", '{"city": "Köln"}')


@pytest.mark.parametrize("text, said, calls", [
    (" plain <tool and <tool_cal", " plain <tool and <tool_cal", []), ("a \n", "a \n", []),
    (f"a {CALL} b c ", "a b c ", [COLOGNE]), (f"{CALL}\n{CALL}\n", "", [COLOGNE] * 2),
    (CALL.removesuffix("\n</tool_call>"), "", [COLOGNE])], ids=range(5))
def test_calls_are_read_whatever_the_pieces(text, said, calls):
    assert {size: read(text, size) for size in range(1, len(text) + 1)} == dict.fromkeys(
        range(1, len(text) + 1), (said, calls))


@pytest.mark.parametrize("body", ["no json", '{"name": "w", "arguments": {"city": "\\ud83d"}}', '{"name": "\\ud83d"}',
                                  '{"name": 1}', '{"arguments": {}}', "[1]", "5", "[" * 100_000])
@pytest.mark.parametrize("close", ["</tool_call>", ""])
def test_what_is_no_call_stays_in_the_text(body, close):
    text = f"a \n<tool_call>{body}{close}"
    reader = CallReader()
    (said, calls), (rest, more) = reader.push(text), reader.flush()
    assert said + rest == text and calls + more == [] and reader.count == 0


def test_a_schema_restricts_the_answer_or_is_refused(client, llm, monkeypatch):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"],
              "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with monkeypatch.context() as patch, pytest.raises(Exception, match="\\.\\[grammar\\]") as caught:
        patch.setitem(__import__("sys").modules, "llguidance", None)
        ask(client, response_format=form)
    assert (caught.value.status_code, caught.value.param) == (400, "response_format")
    with pytest.raises(Exception, match="regex must be one that llguidance") as caught:
        ask(client, extra_body={"structured_outputs": {"regex": "("}})
    assert (caught.value.status_code, caught.value.param) == (400, "structured_outputs")
    pytest.importorskip("llguidance")
    found = ask(client, response_format=form, max_tokens=200, temperature=1.0, seed=1)
    assert found.choices[0].message.content == llm.chat(HELLO, json_schema=schema, max_tokens=200, temperature=1.0,
                                                        seed=1).text
    if found.choices[0].finish_reason == "stop":
        assert [*json.loads(found.choices[0].message.content)] == ["n"]


@pytest.mark.parametrize("given, same", [
    ({"json": {"type": "integer", "maximum": 9}}, {"json_schema": {"type": "integer", "maximum": 9}}),
    ({"json": '{"type": "boolean"}'}, {"json_schema": {"type": "boolean"}}),
    ({"regex": "[a-c]{4}"}, {"regex": "[a-c]{4}"}), ({"json_object": True}, {"json_schema": {"type": "object"}}),
    ({"choice": ["a.b", "1 + 1", "c|d"]}, {"regex": r"a\.b|1 \+ 1|c\|d"})], ids=str)
def test_structured_outputs_are_vllm_s(client, llm, given, same):
    pytest.importorskip("llguidance")
    how = {"max_tokens": 30, "temperature": 1.0, "seed": 3}
    found = continued(client, **how, extra_body={"structured_outputs": given}).choices[0]
    assert found.text == llm.generate("hello", **how, **same).text
    if "choice" in given:
        assert found.text in given["choice"] and found.finish_reason == "stop"


def test_a_model_that_ends_by_itself_has_no_stop_reason(client, llm):
    how = {"logit_bias": {str(llm.tokenizer.eos_id): 100}, "max_tokens": 5}
    found = continued(client, **how).choices[0]
    assert (found.finish_reason, found.stop_reason, found.text) == ("stop", None, "")
    found = continued(client, **how, extra_body={"ignore_eos": True, "stop_token_ids": [llm.tokenizer.eos_id]})
    assert found.choices[0].stop_reason == llm.tokenizer.eos_id


# ---- the other pages -------------------------------------------------------------------------------------------------


def test_models_health_and_description(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == CONTEXT
    assert request(server.url, "GET", "/health")[::2] == (200, '{"status":"ok"}')
    described = json.loads(request(server.url, "GET", "/openapi.json")[2])
    fields = described["components"]["schemas"]["ChatAsked"]["properties"]
    assert {"messages", "max_tokens", "tools", "chat_template_kwargs"} <= set(fields)


def test_metrics_are_read_by_the_benchmark(client, server, llm):
    def counted():
        text = request(server.url, "GET", "/metrics")[2]
        return drafting(text), {(name, labels): value for name, labels, value in samples(text)}

    drafts, before = counted()
    ask(client, max_tokens=40)
    want = llm.chat(HELLO, max_tokens=40)
    later, after = counted()
    assert (later - drafts).source == "vllm counters"

    def more(name, **labels):
        return sum(value - before.get(key, 0.0) for key, value in after.items()
                   if key[0] == f"vllm:{name}" and all(f'{k}="{v}"' in key[1] for k, v in labels.items()))

    assert more("generation_tokens") == 40 and more("prompt_tokens") == len(want.prompt_token_ids)
    assert more("request_success", finished_reason="length") == 1 and more("time_to_first_token_seconds_count") == 1
    assert after["vllm:num_requests_running", 'engine="0",model_name="tiny"'] == 0


def test_a_prompt_that_begins_like_another_is_read_from_there_on(client, server, llm):
    """Pages have 64 tokens, and a prompt of texts has one a character."""
    def cached(prompt, salt=None, **more):
        found = continued(client, prompt=prompt, max_tokens=70, extra_body={"cache_salt": salt}, **more)
        return found.choices[0].text, found.usage.prompt_tokens_details.cached_tokens

    def counted():
        return [value for name, _, value in samples(request(server.url, "GET", "/metrics")[2])
                if name in ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")]

    first, none = cached("It is so. " * 13)
    asked, hit = counted()
    prompts = ["It is so. " * 13, "It is so. " * 13 + first, "It is so. " * 7 + "Or not. " * 8]
    found = [cached(prompt) for prompt in prompts]
    longer, hits = counted()
    assert [none, *(count for _, count in found)] == [0, 128, 192, 64]
    assert hits - hit == 128 + 192 + 64 and longer - asked == sum(len(llm.tokenizer.encode(p)) for p in prompts)
    assert [text for text, _ in found] == [llm.generate(p, max_tokens=70, cache_salt="other").text for p in prompts]
    assert cached(prompts[0], "mine")[1] == 0 and cached(prompts[0], "mine")[1] == 128
    chunks = list(continued(client, prompt=prompts[0], n=2, max_tokens=2, stream=True,
                            stream_options={"include_usage": True}))
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 128


def test_drafts_are_counted_in_the_blocks_that_had_some(llm):
    """How wide blocks are follows the time that they take, so an answer's own are not those of another run."""
    counts = Metrics(llm, "tiny")
    counts.took(Chunk(0, "", [1] * 8, None, Completion("", [1] * 8, "length", steps=(3, 1, 2, 1), widths=(4, 1, 2, 3),
                                                       seconds=4.5, time_to_first_token=1.0)))
    found = drafting(counts.text().decode())
    assert (found.drafts, found.accepted, found.by_position) == (3, 3, (2, 1)) and found.length == 2
    labels = '{engine="0",model_name="tiny"}'
    assert f"vllm:spec_decode_num_draft_tokens_total{labels} 6.0" in counts.text().decode()
    assert f"vllm:request_time_per_output_token_seconds_sum{labels} 0.5" in counts.text().decode()
