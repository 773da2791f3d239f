"""A tokenizer from files: what they may say, and what is refused."""

import json
import os
import random

import pytest

pytest.importorskip("tokenizers")

from dflash_decode.checkpoint import CheckpointError, load_checkpoint
from dflash_decode.checkpoint.gguf import file as gguf_file
from dflash_decode.checkpoint.tokenizer import load_tokenizer


def small_directory(folder, **config):
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<turn>": 3, "hello": 4, "world": 5}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<turn>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_directory(tmp_path):
    folder = small_directory(tmp_path, eos_token={"content": "</s>"}, bos_token="<s>",
                             chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    found = load_tokenizer(folder)
    assert found.encode("hello world") == [4, 5] and found.stop_ids == (2, 3)
    assert found.apply_chat_template([{"role": "user", "content": "hello"}]) == "<s>hello"
    (folder / "chat_template.jinja").write_text("T{{ messages | length }}")
    assert load_tokenizer(folder).apply_chat_template([{}, {}]) == "T2"


def test_named_templates(tmp_path):
    folder = small_directory(tmp_path, chat_template=[{"name": "tool_use", "template": "X"},
                                                      {"name": "default", "template": "D"}])
    assert load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "x"}]) == "D"


@pytest.mark.parametrize("template, message", [
    (None, "expected a chat template; the model has none"),
    ("{{ raise_exception('roles must alternate') }}", "the chat template failed: roles must alternate"),
    ("{% if %}", "the chat template failed"),
    ("{{ ''.__class__.__mro__ }}", "the chat template failed"),
    ("{{ messages.append(1) }}", "the chat template failed"),
])
def test_bad_templates(tmp_path, template, message):
    found = load_tokenizer(small_directory(tmp_path, chat_template=template))
    with pytest.raises(CheckpointError, match=message):
        found.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("file, content, message", [
    ("tokenizer.json", None, "tokenizer.json: expected this file; got none"),
    ("tokenizer.json", "{}", "expected a tokenizer of the tokenizers library"),
    ("tokenizer.json", "\x00", "expected a tokenizer of the tokenizers library"),
    ("tokenizer_config.json", "[1]", "expected a JSON object; got list"),
    ("tokenizer_config.json", "{", "expected JSON"),
    ("config.json", '{"eos_token_id": "x"}', "config.json: eos_token_id must be an integer or a list of them"),
])
def test_damaged_directories(tmp_path, file, content, message):
    folder = small_directory(tmp_path)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("config, message", [
    ({"bos_token": 5}, "bos_token must be text or an object with \"content\"; got 5"),
    ({"eos_token": {"content": 5}}, "eos_token must be text or"),
    ({"eos_token": {}}, "eos_token must be text or"),
    ({"pad_token": ["</s>"]}, "pad_token must be text or"),
    ({"extra_special_tokens": {"image_token": 5}}, "image_token must be text or"),
    ({"chat_template": 5}, "chat_template must be text; got int"),
    ({"chat_template": {"default": 5}}, "chat_template must be text; got int"),
    ({"chat_template": ["x"]}, "chat_template must be a list of"),
    ({"chat_template": [{"template": "x"}]}, "chat_template must be a list of"),
    ({"chat_template": [{"name": "default"}]}, "chat_template must be text; got NoneType"),
])
def test_tokens_and_templates_of_another_type(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(small_directory(tmp_path, **config))


@pytest.mark.parametrize("ends", ["true", "-1", "[2, null]", "2.5", "4294967296"])
def test_eos_token_ids_of_another_type(tmp_path, ends):
    folder = small_directory(tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    with pytest.raises(CheckpointError, match="eos_token_id must be an integer or a list of them"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
@pytest.mark.parametrize("content, message", [
    (b"\xff{{ messages }}", "expected text in UTF-8"),
    (b"x" * 600_000, "expected at most 524,288 bytes; got 600,000"),
])
def test_damaged_template_files(tmp_path, name, content, message):
    folder = small_directory(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                  "generation_config.json", "config.json", "chat_template.jinja"])
def test_pipes_and_folders_are_not_read(tmp_path, name):
    folder = small_directory(tmp_path)
    for make in (os.mkfifo, os.mkdir):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(CheckpointError, match=f"{name}: expected a regular file; got"):
            load_tokenizer(folder)


def test_a_tokenizer_json_that_is_cut_off(tmp_path):
    file = small_directory(tmp_path) / "tokenizer.json"
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="tokenizer.json: expected a tokenizer of the tokenizers library"):
            load_tokenizer(tmp_path)


def changed(folder, **changes):
    """The directory, with other parts in its tokenizer.json."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_truncation_and_padding_of_training_are_off(tmp_path):
    """As in transformers: prompts were cut to what the tokenizer.json said, or filled up to it."""
    transformers = pytest.importorskip("transformers")
    padding = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<unk>"}
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    folder = changed(small_directory(tmp_path, tokenizer_class="PreTrainedTokenizerFast"), padding=padding,
                     truncation=cut)
    text = "hello world hello"
    found = load_tokenizer(folder).encode(text)
    assert found == [4, 5, 4] == transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize("part, step", [
    ("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 60}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 5000}),
    ("decoder", {"type": "Sequence", "decoders": [REPLACE] * 60}),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 5000,
                        "pair": [], "special_tokens": {}}),
])
def test_a_tokenizer_that_multiplies_its_text(tmp_path, part, step):
    with pytest.raises(CheckpointError, match=f"tokenizer.json: {part} must make at most 1024 of one"):
        load_tokenizer(changed(small_directory(tmp_path), **{part: step}))


def test_a_panic_of_the_library_is_a_checkpoint_error(tmp_path):
    """It is no Exception in Python. Here: an expression that backtracks without end."""
    found = load_tokenizer(changed(small_directory(tmp_path), normalizer={
        "type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}))
    with pytest.raises(CheckpointError, match="expected a tokenizer of the tokenizers library; got .*retry-limit"):
        found.encode("a" * 40 + "!")


@pytest.mark.parametrize("text", [None, 5, ["hello"], b"hello"])
def test_text_of_another_type(tmp_path, text):
    with pytest.raises(TypeError, match="text must be a string; got"):
        load_tokenizer(small_directory(tmp_path)).encode(text)


def test_mutated_files_load_or_are_refused(tmp_path):
    """Nothing but CheckpointError comes out of a directory whose files have wrong values in places."""
    rng = random.Random(0)
    names, outcomes = ("tokenizer.json", "tokenizer_config.json", "config.json"), set()
    small_directory(tmp_path, bos_token="<s>", extra_special_tokens={"image_token": "<turn>"}, chat_template=[
        {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}])
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 3]}')
    whole = {name: (tmp_path / name).read_text() for name in names}
    for _ in range(200):
        for name in names:
            (tmp_path / name).write_text(whole[name])
        name = rng.choice(names)
        (tmp_path / name).write_text(json.dumps(mutated(rng, json.loads(whole[name]))))
        try:
            found = load_tokenizer(tmp_path)
            found.decode(found.encode("hello <turn> x", add_special_tokens=True))
            found.apply_chat_template([{"role": "user", "content": "x"}])
            outcomes.add("loaded")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def mutated(rng, value):
    """One value somewhere in it replaced or left out."""
    holder = value
    while True:
        key = rng.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.3:
            break
        holder = holder[key]
    if isinstance(holder, dict) and rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice([None, True, -1, 10**9, 2**63, 1e308, "", "a", "(", [], {}, [None], {"a": None}])
    return value


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_tokenizer(tmp_path, **fields):
    """From the file, and from the directory that it is converted to."""
    pytest.importorskip("gguf")
    from tests.decode.test_weights import write_gguf

    write_gguf(tmp_path / "m.gguf", **{f"tokenizer__{name}": value for name, value in fields.items()})
    fresh = load_tokenizer(tmp_path / "m.gguf")
    load_checkpoint(tmp_path / "m.gguf")
    assert gguf_file.cached(tmp_path / "m.gguf")
    return fresh, load_tokenizer(tmp_path / "m.gguf")


def tokens(**changes):
    return [changes.get(f"t{i}", text) for i, text in enumerate(["<e>", "a", "b", "ab"] + [f"t{i}" for i in range(36)])]


@pytest.mark.parametrize("bos", ["<s>", "<a b>", "<a:b>", "a:0", "$A", "$", ":", " ", "bos", "<$A:0 x:1>", "é💥"])
def test_gguf_bos_of_any_text(tmp_path, monkeypatch, bos):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    for found in gguf_tokenizer(tmp_path, ggml__tokens=tokens(t5=bos), ggml__add_bos_token=True,
                                ggml__bos_token_id=5):
        assert found.encode("ab<e>a", add_special_tokens=True) == [5, 3, 0, 1]
        assert found.bos_token == bos


def test_gguf_special_tokens_reach_the_template(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    template = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ tools is none }}"
    for found in gguf_tokenizer(tmp_path, ggml__padding_token_id=1, ggml__unknown_token_id=2, chat_template=template):
        assert found.apply_chat_template([{"role": "user", "content": "x"}]) == "|<e>|b|a|True"


@pytest.mark.parametrize("fields, message", [
    ({"ggml__merges": [1, 2]}, "tokenizer.ggml.merges must be a list of str; got int in it"),
    ({"ggml__tokens": [1] * 40}, "tokenizer.ggml.tokens must be a list of str; got int in it"),
    ({"ggml__token_type": ["x"] * 40}, "tokenizer.ggml.token_type must be a list of int; got str in it"),
    ({"ggml__merges": ["ab"]}, "tokenizer.ggml.merges must fit its tokens"),
    ({"ggml__padding_token_id": 99}, r"padding_token_id must be in \[0, 40\); got 99"),
])
def test_gguf_fields_of_another_type(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer(tmp_path, **fields)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_copy_of_a_gguf_tokenizer_is_not_believed(tmp_path, monkeypatch, name, damage):
    """A missing tokenizer_config.json took the chat template with it; half a tokenizer.json failed at every start."""
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    fresh, _ = gguf_tokenizer(tmp_path, chat_template="T")
    file = gguf_file.cached(tmp_path / "m.gguf") / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut off":
        file.write_bytes(whole[:len(whole) // 2])
    found = load_tokenizer(tmp_path / "m.gguf")
    assert found.chat_template == "T" and found.encode("ab") == fresh.encode("ab")
