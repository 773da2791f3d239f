"""Chat templates against transformers' renderer."""

import dataclasses
import enum
import json
from datetime import datetime

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

from dflash_decode import chat_template
from dflash_decode.checkpoint import CheckpointError
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from tests.decode.test_tokenizer_files import small_directory
from tests.support.templates import FAMILIES, TOKENS, TOOLS, assistant, ours, user

CALL = {"id": "call00001", "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2], "deep": {"a": None}}}}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"t": 20}'}
SYSTEM = {"role": "system", "content": " Be brief. /no_think"}
TALKS = {
    "one turn": ([user(" Hi! \n")], {}),
    "many turns": ([user("Hi"), assistant(" Hello.\n"), user("naïve 日本語 {x} <b> & '\"")], {}),
    "system": ([SYSTEM, user("Hi"), assistant("Hello."), user("1+1?")], {}),
    "thoughts in the text": ([user("Hi"), assistant("<think>\nhm\n</think>\n\nHello."), user("more")], {}),
    "thoughts apart": ([user("Hi"), assistant("Hello.", reasoning_content="hm")], {"enable_thinking": False}),
    "thoughts by another name": ([user("Hi"), assistant("Hello.", reasoning="hm"), user("more")], {}),
    "tools": ([SYSTEM, user("Weather?"), assistant("", tool_calls=[CALL]), RESULT, assistant("20")], {"tools": TOOLS}),
    "a tool's arguments as text, content null": ([user("Weather?"), assistant(None, tool_calls=[
        {**CALL, "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]), RESULT], {"tools": TOOLS}),
    "no tools": ([user("Hi")], {"tools": []}),
    "parts": ([user([{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "this?"}])], {}),
    "documents": ([user("Hi")], {"documents": [{"title": "T", "text": "body", "metadata": {"a": 1}}]}),
    "roles that do not alternate": ([assistant("x"), assistant("y")], {}),
    "no token": ([user("Hi")], {"bos_token": None}),
}


class Stopped(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 2, 3, 4, 5, 6)


@pytest.fixture
def theirs(monkeypatch):
    """transformers' text, or the exception."""
    pytest.importorskip("transformers")
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Stopped)
    monkeypatch.setattr(chat_template, "datetime", Stopped)

    def render(template, messages, add, **variables):
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]  # as its tokenizer does
        try:
            found, _ = chat_template_utils.render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=add, **TOKENS | variables)
        except Exception as error:
            return error
        return found[0]

    return render


@pytest.mark.parametrize("family", FAMILIES)
def test_families_render_as_in_transformers(theirs, family):
    template, texts = FAMILIES[family], set()
    for name, (talk, variables) in TALKS.items():
        for add in (True, False):
            expected = theirs(template, talk, add, **variables)
            if isinstance(expected, str):
                assert ours(template, talk, add, **variables) == expected, name
                texts.add(expected)
            else:
                with pytest.raises(CheckpointError) as raised:
                    ours(template, talk, add, **variables)
                assert str(expected)[:30] in str(raised.value), name
    assert len(texts) > 1


def test_there_are_forty_families():
    assert len(FAMILIES) >= 40


@dataclasses.dataclass
class Message:
    role: str
    content: object


class Role(str, enum.Enum):
    USER = "user"


class Model:
    def __init__(self, **values):
        self.values = values

    def model_dump(self):
        return self.values


@pytest.mark.parametrize("template", [
    "{{ tools is none }}{{ tools is not none }}{{ tools is defined }}{{ documents is none }}{{ documents is defined }}",
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token }}|{{ sep_token is defined }}",
    "a{% generation %}b{% set x = 1 %}{{ messages|length }}{% endgeneration %}c{{ x }}",
    "{%- for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if loop.first %}{% continue %}{% endif %}{% if loop.index == 3 %}{% break %}{% endif %}x{% endfor %}",
    "{{ {'b': 'é<>&', 'a': [1, 2.5, none, true]}|tojson }}{{ [1, {'a': 1}]|tojson(indent=2) }}"
    "{{ {'b': 1, 'a': 'é'}|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
    "{{ strftime_now('%d %b %Y %H:%M') }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['a'], 1) }}{{ dict([('a', 1)])|length }}{{ dict is callable }}",
    "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = ns.a + ns.self %}{{ ns.b }}{{ ns.missing }}",
    "{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 10 }}{{ 2 ** -1 }}{{ 'ab' * 2 }}{{ [1] * 2 + [3] }}{{ -3 }}{{ 7 - 2.5 }}",
    "{{ '%s-%03d %%' % ('a', 7) }}{{ '%(a)s' % {'a': 1} }}{{ '%5.1f|%-4s' % (1.25, 'x') }}{{ '%s' % 1 }}",
    "{{ 'a' ~ 1 ~ none ~ [1] ~ missing }}{{ 1 < 2 < 3 }}{{ 3 > 2 > 2 }}{{ 1 in [1] and 'b' not in 'abc' }}",
    "{{ '{} {a:>5} {!r} {{}}'.format('x', 'y', a=1) }}{{ '{a[b]}'.format_map({'a': {'b': 2}}) }}{{ '%d'|format(3) }}",
    "{{ range(5)|map('string')|join(',') }}{{ [3, 1, 2]|sort }}{{ [3, 1]|sum }}{{ [[1], [2]]|sum(start=[]) }}"
    "{{ messages|map(attribute='role')|unique|list }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}",
    "{{ messages|groupby('role')|map('first')|list }}{{ {'b': 1, 'a': 2}|dictsort }}{{ {'b': 1}|items|list }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 1 in range(3)|map('int') }}",
    "{{ 2.567|round(1) }}{{ 2.4|round(0, 'ceil') }}{{ '12'|int + '1.5'|float }}{{ 'ff'|int(base=16) }}{{ 1.5|int }}",
    "{{ 'a\nb'|indent(2) }}{{ 'x'|center(5) }}{{ 'a b c'|wordwrap(2) }}{{ '<b>x</b>'|striptags }}{{ 'a'|truncate(3) }}",
    "{% filter upper %}a{% endfilter %}{% set x %}b{{ 1 }}{% endset %}{{ x }}{% with y = 2 %}{{ y }}{% endwith %}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() }}{% endmacro %}"
    "{% call m(1, 2, 3, c=4) %}x{% endcall %}",
    "{% for m in messages recursive %}{{ m.role }}{% if m.sub %}{{ loop(m.sub) }}{% endif %}{% else %}none{% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] if a > 1 %}{{ loop.index }}{{ a }}{{ b }}{{ loop.cycle('x', 'y') }}{% endfor %}",
    "{{ (1).bit_length() }}{{ 'é'.encode('utf-8') }}{{ messages[0].get('role') }}{{ messages[::-1]|length }}",
    "{% autoescape true %}{{ '<' }}{{ messages[0].role ~ '<b>'|safe }}{% endautoescape %}",
    "{{ '<'|escape }}{{ missing|default('d') }}{{ ''|d('e', true) }}{{ 'a b'|urlencode }}{{ 'ab'|list|last }}",
    "{{ lipsum is defined }}{{ cycler(1, 2).next() }}{% set j = joiner(',') %}{{ j() }}{{ j() }}{{ x is undefined }}",
])
def test_names_and_values_are_those_of_transformers(theirs, template):
    talk = [{"role": "user", "content": "a", "sub": [{"role": "b"}]}, assistant("c"), user("d"), user("e")]
    expected = theirs(template, talk, True)
    assert isinstance(expected, str), expected
    assert ours(template, talk) == expected


@pytest.mark.parametrize("talk", [
    [{"role": "user", "content": "a", "name": None, "tool_calls": None}],
    [{"role": Role.USER, "content": (1, 2.5, True, None)}],
    [{"role": "user", "content": [{"image": object()}, {"f": Message("a", [1])}]}],
    [{"role": "assistant", "content": "a", "reasoning": "r"}, {"role": "assistant", "content": "a", "thinking": "t"},
     {"role": "assistant", "content": "a", "reasoning_content": "", "thinking": "t"}],
], ids=["keys that are null", "an enum and a tuple", "objects", "reasoning"])
def test_messages_are_shown_as_in_transformers(theirs, talk):
    import numpy as np

    template = "{{ messages }}{{ extra }}{% for m in messages %}{{ m.name is defined }}{{ m.items()|list }}{% endfor %}"
    extra = {"n": np.float32(0.5), "b": np.bool_(False), "m": Model(a=1)}
    assert ours(template, talk, extra=extra) == theirs(template, talk, True, extra=extra)


# ---- from a directory ------------------------------------------------------------------------------------------------

PROBE = ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token }}|{{ image_token }}|"
         "{{ audio_token }}|{{ bos_token is defined }}|{{ tools is none }}|{{ documents is none }}")


@pytest.mark.parametrize("config", [
    {"bos_token": None, "eos_token": "</s>"},
    {"bos_token": "<s>", "pad_token": "<turn>", "unk_token": "<unk>"},
    {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "add_bos_token": True, "x_token": 5},
    {"image_token": "<turn>", "extra_special_tokens": {"audio_token": "<s>"}},
    {"additional_special_tokens": ["<turn>"], "image_token": "<turn>"},
    {"bos_token": "not in the vocabulary"},
], ids=["null", "pad and unk", "objects", "own tokens", "additional tokens", "unknown token"])
@pytest.mark.parametrize("older", [None, {"bos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<unk>"}])
def test_special_tokens_equal_transformers(tmp_path, config, older):
    transformers = pytest.importorskip("transformers")
    folder = small_directory(tmp_path, tokenizer_class="PreTrainedTokenizerFast", chat_template=PROBE, **config)
    if older:
        (folder / "special_tokens_map.json").write_text(json.dumps(older))
    talk = [user("x")]
    assert load_tokenizer(folder).apply_chat_template(talk) == transformers.AutoTokenizer.from_pretrained(
        folder).apply_chat_template(talk, tokenize=False)


def test_templates_by_name_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = small_directory(tmp_path, tokenizer_class="PreTrainedTokenizerFast", chat_template=[
        {"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
    for files in ((), ("chat_template.jinja",), ("additional_chat_templates/tool_use.jinja",)):
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(f"{file} {{{{ tools }}}}")
        mine, other = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for tools in (None, TOOLS):
            assert mine.apply_chat_template([user("x")], tools=tools) == other.apply_chat_template(
                [user("x")], tools=tools, tokenize=False)


def test_templates_by_name_without_a_default(tmp_path):
    found = load_tokenizer(small_directory(tmp_path, chat_template=[{"name": "rag", "template": "R"}]))
    with pytest.raises(CheckpointError, match="expected a chat template named default; got rag"):
        found.apply_chat_template([user("x")])


@pytest.mark.parametrize("arguments, message", [
    ({"messages": "hi"}, "messages must be a list of .*; got str"),
    ({"messages": {"role": "user"}}, "messages must be a list of .*; got dict"),
    ({"messages": 5}, "messages must be a list of .*; got int"),
    ({"messages": []}, "messages must be at least one; got none"),
    ({"messages": ["hi"]}, "a message must be a mapping .*; got 'hi'"),
    ({"tools": "x"}, "tools must be a list of dicts; got 'x'"),
    ({"tools": [print]}, "tools must be a list of dicts"),
    ({"documents": ["x"]}, "documents must be a list of dicts"),
    ({"continue_final_message": True}, "makes text of the model's own template; got continue_final_message"),
    ({"tokenize": True}, "makes text of the model's own template; got tokenize"),
])
def test_arguments_of_another_form(tmp_path, arguments, message):
    found = load_tokenizer(small_directory(tmp_path, chat_template="{{ messages }}"))
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        found.apply_chat_template(**{"messages": [user("x")]} | arguments)
    assert not isinstance(raised.value, CheckpointError)  # the model is not at fault


def test_messages_without_end(tmp_path):
    talk = [user("x")]
    talk[0]["content"] = talk
    with pytest.raises(ValueError, match="messages must not be nested without end"):
        ours("{{ messages }}", talk)


# Also the dearest of real templates: all of the text so far is joined with each message.
JOINING = ("{% set ns = namespace(out='') %}{% for m in messages %}"
           "{% set ns.out = ns.out ~ m.role ~ ': ' ~ m.content ~ '\n' %}{% endfor %}{{ ns.out }}")


@pytest.mark.parametrize("family", ["Llama-3.1", "Qwen3", "Mistral-v0.3", "Gemma-4", "GLM-4.6", "DeepSeek-V3", None])
def test_a_thousand_messages_of_a_megabyte(theirs, family):
    """Some 250,000 tokens."""
    template, text = FAMILIES.get(family, JOINING), "word " * 200
    talk = [turn for _ in range(500) for turn in (user(text), assistant(text))] + [user("end")]
    if family == "Gemma-4":  # it looks at all messages for each
        talk = talk[-201:]
    assert ours(template, talk, tools=TOOLS) == theirs(template, talk, True, tools=TOOLS)


def test_two_messages_of_a_megabyte(theirs):
    thoughts = "<think>" + "hm " * 100_000 + "</think>"
    talk = [user("word 語 " * 100_000), assistant(thoughts + "word " * 100_000), user("x")]
    for family in ("Llama-3.1", "Qwen3", "gpt-oss", "Command-R", "SmolLM3"):
        assert ours(FAMILIES[family], talk) == theirs(FAMILIES[family], talk, True)
