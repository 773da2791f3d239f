"""The front door in Python: what a new user has and what they get wrong, each with its answer."""

import json
import re

import numpy as np
import pytest
import torch

from dflash_decode import session
from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.checkpoint.errors import CheckpointError, read_json
from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Request
from dflash_decode.sampling import SamplingParams
from dflash_decode.session import Session
from dflash_kernels.testing import use_isa
from tests.support import tiny

HI = [{"role": "user", "content": "hi"}]
KINDS = r"must be a text, a list of messages \{'role': \.\.\., 'content': \.\.\.\}, or token ids; got "


@pytest.fixture(scope="module")
def loaded(models):
    return Session.load(models["model"], models["draft"])


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_messages_are_a_conversation_not_the_text_of_a_list(loaded):
    assert loaded.tokenizer.decode(loaded.prompt_ids(HI), skip_special_tokens=False) == "<u>hi<a>"
    assert loaded.prompt_ids(HI) == loaded.prompt_ids("hi") == loaded.prompt_ids(HI[0])
    three = [*HI, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "ha"}]
    assert loaded.tokenizer.decode(loaded.prompt_ids(three), skip_special_tokens=False) == "<u>hi<u>ho<u>ha<a>"


@pytest.mark.parametrize("ids", [
    [7, 8], (7, 8), range(7, 9), [np.int64(7), np.int32(8)], np.array([7, 8]), np.array([[7, 8]], np.uint8), [[7, 8]],
    torch.tensor([7, 8]), torch.tensor([[7, 8]], dtype=torch.int32), {"input_ids": [7, 8], "attention_mask": [1, 1]},
    {"input_ids": torch.tensor([[7, 8]])}], ids=str)
def test_token_ids_are_taken_as_they_are(loaded, ids):
    found = loaded.prompt_ids(ids)
    assert found == [7, 8] and all(type(i) is int for i in found)


@pytest.mark.parametrize("prompt, message", [
    (None, KINDS + "None"), (5, KINDS + "5"), (b"hi", KINDS + "b'hi'"), ({1, 2}, KINDS + r"\{1, 2\}"),
    ([1.5], KINDS + "1.5"), ([True], KINDS + "True"), (np.array([1.5]), KINDS + "1.5"), (torch.ones(2), KINDS + "1.0"),
    ([], "at least 1 token; got"), ([[]], "at least 1 token"), (torch.tensor([]), "at least 1 token"),
    (["a", "b"], "got 'a' in a list: give each prompt by itself"),
    ([[1], [2]], r"got \[1\] in a list: give each prompt's ids separately, in a list and without padding"),
    ({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 1]]}, "got a batch of 2: give each prompt's ids"),
    ({"input_ids": [[1], [3, 4]], "attention_mask": [[1], [1, 1]]}, "got a batch of 2: give each prompt's ids"),
    ("\ud800", r"text must be valid Unicode; got '\\ud800'"),
    ([{"role": "user", "content": "\ud800"}], "text must be valid Unicode"),
    ([-1], r"token ids in \[0, 264\); got -1"), ([264], r"token ids in \[0, 264\); got 264"),
    (torch.zeros(2, 3).long(), r"shape \(n,\) or \(1, n\); got \(2, 3\)"), (torch.tensor(3), r"got \(\)"),
    ({"input_ids": [0, 1], "attention_mask": [0, 1]}, "without padding; got an attention_mask with zeros"),
    ([{"content": "x"}], "message 1 must be"), ([*HI, "hi"], "message 2 must be .*; got 'hi'"),
    ({"text": "x"}, "message 1 must be"), ((i for i in [1]), KINDS + "<generator")])
def test_what_is_no_prompt_is_refused(loaded, prompt, message):
    with pytest.raises((TypeError, ValueError), match=r"^Session\.prompt_ids: prompt.*" + message):
        loaded.prompt_ids(prompt)


def test_a_model_without_a_template_takes_text_and_no_messages(loaded, monkeypatch):
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    assert loaded.prompt_ids("hi") == loaded.tokenizer.encode("hi", add_special_tokens=True)
    with pytest.raises(CheckpointError, match="chat template"):
        loaded.prompt_ids(HI)


# ---- run -------------------------------------------------------------------------------------------------------------


def test_run_takes_one_prompt_or_a_list_of_any_kinds(loaded):
    def answers(prompts):
        return [(a.tokens, a.text) for a in loaded.run(prompts, max_tokens=4).answers]

    text, = answers([loaded.prompt_ids("hi")])
    assert text[1] == loaded.tokenizer.decode(text[0])
    ids, = answers([[1, 2, 3]])
    for one in ("hi", HI, HI[0], ["hi"], [HI]):
        assert answers(one) == [text]
    for one in ([1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), torch.tensor([[1, 2, 3]]), {"input_ids": [1, 2, 3]}):
        assert answers(one) == [ids]
    assert answers(["hi", [1, 2, 3], HI, torch.tensor([1, 2, 3])]) == [text, ids, text, ids]
    assert answers(prompt for prompt in ("hi", HI)) == [text, text] and answers([]) == []


@pytest.mark.parametrize("prompts, message", [
    (None, "prompts must be one prompt or a list of them, each a text"), (5, "prompts must be one prompt"),
    (b"x", "prompts must be one prompt"),
    ([None], "prompt 1 " + KINDS + "None"), ([[]], "prompt 1 must have at least 1 token"),
    ({1, 2}, r"prompts must be one prompt .*; got \{1, 2\}, of type set"), ({"a"}, "prompts .* of type set"),
    ((i for i in [1]), "token ids must be in a list, a tensor or an array; got <generator .*, of type generator"),
    ("\ud800", "prompt 1: text must be valid Unicode"), (["hi", "\ud800"], "prompt 2: text must be valid Unicode"),
    ({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 1]]},
     "prompt 1: input_ids must be of one prompt; got a batch of 2: give each prompt's ids separately, in a list and"),
    ([[1], ["a"]], "prompt 2 .* got 'a' in a list"), (np.ones((2, 2), int), r"token ids .* got \(2, 2\): give each"),
    (["hi", "x" * 200], "prompt 2 must be shorter than the model's context of 128 tokens; got 202")],
    ids=lambda value: str(value)[:20])
def test_prompts_that_are_none(loaded, prompts, message):
    with pytest.raises((TypeError, ValueError), match=r"^Session\.run: " + message) as error:
        loaded.run(prompts, max_tokens=4)
    assert len(re.findall(r"prompt \d", str(error.value))) < 2 and "request" not in str(error.value)


def test_what_ends_a_request_is_told_of_its_prompt(loaded, monkeypatch):
    class Broken:
        def fill_bitmask(self, tokens, words):
            raise OSError("no grammar")

    with pytest.raises(ValueError, match=r"^Session\.run: prompt 1: grammar: OSError: no grammar$"):
        loaded.run([[1]], max_tokens=2, sampling=SamplingParams(grammar=Broken()))
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    monkeypatch.setattr(loaded.tokenizer, "encode", lambda text, add_special_tokens: [])
    with pytest.raises(ValueError, match=r"^Session\.run: prompt 1 must have at least 1 token; got ''$"):
        loaded.run("", max_tokens=2)


@pytest.mark.parametrize("seed", [np.int64(4), np.int32(2**31 - 1), np.uint8(255), np.int64(2**63 - 1)], ids=repr)
def test_a_seed_of_numpys_counts_on_from_prompt_to_prompt(loaded, seed):
    run = loaded.run(
        [[1], [2]], max_tokens=1, sampling=SamplingParams(temperature=1, seed=seed, top_k=np.int64(-1))
    )
    assert [answer.seed for answer in run.answers] == [int(seed), (int(seed) + 1) % 2**63]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1; got 0"),
        ({"max_tokens": 2.0}, "max_tokens must be an integer of at least 1; got 2.0"),
        ({"max_tokens": None}, "max_tokens must be an integer"),
        ({"concurrency": 0}, "concurrency must be"),
        ({"concurrency": "all"}, "concurrency must be an integer of at least 1; got 'all'"),
        ({"speculative": None}, "speculative must be True or False; got None"),
        ({"on_tokens": None}, "on_tokens must be a function"),
        ({"sampling": 0.7}, "sampling must be a SamplingParams; got 0.7"),
        ({"sampling": {"temperature": 1}}, "sampling must be a SamplingParams"),
        ({"sample_from": "distribution"}, "sample_from must be one"),
        ({"rule": None}, "rule must be one of token, block; got None"),
        ({"sampling": SamplingParams(top_k=-2)}, "top_k must be an integer, -1 or 0"),
    ],
    ids=str,
)
def test_options_of_run(loaded, options, message):
    with pytest.raises((TypeError, ValueError), match=r"^Session\.run: " + message):
        loaded.run("hi", **{"max_tokens": 4} | options)


def test_a_run_uses_the_decoder_of_one_before(models, monkeypatch):
    """Its passes are recorded. What it was not made for gets a new one; texts are those of a new session."""
    monkeypatch.setattr(session, "_CONTEXT_STEP", 16)
    loaded, prompts = Session.load(models["model"], models["draft"]), ([[1, 2, 3], [4]], [[5, 6], [7, 8]])

    def run(of, i=0, **options):
        found = of.run(prompts[i], **{"max_tokens": 6, "concurrency": 2} | options)
        return [answer.tokens for answer in found.answers], list(of._decoders.values())[-1]

    texts, first = run(loaded)
    again, second = run(loaded, 1)
    other, baseline = run(loaded, 1, speculative=False)
    assert second is first is not baseline and again == other == run(Session.load(models["model"], None), 1)[0]
    assert run(loaded) == (texts, first) and run(loaded, speculative=False)[1] is baseline
    with use_isa("generic"):
        assert run(loaded)[1] is not first
    assert run(loaded)[1] is first
    second = run(loaded, max_tokens=30)[1]  # the first has no room for it
    assert second is not first and run(loaded, concurrency=1)[1].max_batch == 1 and run(loaded)[1] is second
    assert len(loaded._decoders) == 4
    loaded.adapts = False
    assert run(loaded)[0] == texts and len(loaded._decoders) == 4

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(loaded, on_tokens=interrupt)
    assert len(loaded._decoders) == 3 and run(loaded)[0] == texts


def test_nothing_is_decoded_before_every_prompt_is_read(loaded):
    told = []
    with pytest.raises(ValueError, match="prompt 2"):
        loaded.run([[1, 2], []], max_tokens=2, on_tokens=lambda *news: told.append(news))
    assert told == []


def test_top_k_of_minus_1_is_off(loaded):
    def drawn(top_k):
        return [a.tokens for a in loaded.run(
            [[1, 2], [3]], max_tokens=8, sampling=SamplingParams(temperature=2.0, seed=5, top_k=top_k)).answers]

    assert SamplingParams(top_k=-1) == SamplingParams() and drawn(-1) == drawn(0) != drawn(1)


# ---- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, want", [
    (torch.float32, torch.float32), ("fp32", torch.float32), ("torch.float32", torch.float32), ("Float", torch.float32),
    (np.float32, torch.float32), (np.dtype("float16"), torch.float16), ("half", torch.float16), ("f16", torch.float16),
    ("bf16", torch.bfloat16), (torch.bfloat16, torch.bfloat16), ("auto", torch.bfloat16)], ids=str)
def test_dtypes_by_their_names_here_and_elsewhere(models, given, want):
    found = Session.load(models["model"], models["draft"], dtype=given)
    assert found.target.dtype == found.drafter.dtype == want


@pytest.mark.parametrize("fields, want", [
    ({"dtype": "float32"}, torch.float32), ({"torch_dtype": "float16"}, torch.float16),
    ({"text_config": {"dtype": "float32"}}, torch.float32), ({}, torch.bfloat16), ({"dtype": "float64"}, None),
    ({"dtype": 5}, None)], ids=str)
def test_auto_is_what_the_models_config_says(tmp_path, fields, want):
    folder = tiny.write_target(tmp_path)
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | fields))
    if want:
        assert Session.load(folder, dtype="auto").target.dtype == want
    else:
        with pytest.raises(CheckpointError, match="dtype must be .* for dtype 'auto'; got .*: choose one"):
            Session.load(folder, dtype="auto")


@pytest.mark.parametrize("options, message", [
    *(({"dtype": dtype}, "dtype must be 'auto', 'bfloat16', 'float16' or 'float32', or torch's own; got ")
      for dtype in ("int4", "", torch.float64, float, None, 5)),
    *(({"device": device}, "device must be 'cpu' or a CUDA device, 'cuda' or 'cuda:N'; got ")
      for device in ("gpu", "mps", "meta", None, True)),
    ({"weights": "int4"}, "weights must be one of auto, model, int8, file, exact; got 'int4'"),
    ({"drafter_weights": None}, "drafter_weights must be one of auto, int8, model; got None"),
    ({"block_size": 0}, "block_size must be an integer of at least 1; got 0"),
    ({"block_size": "4"}, "block_size must be an integer"), ({"model": ""}, "model must be a path"),
    ({"status": 5}, "status must be a function of a text .*; got 5"),
    ({"drafter": 5}, "drafter must be a path or a name; got 5"), ({"model": 5}, "model must be a path or a name"),
    ({"drafter": ""}, "drafter must be a path or a name; got an empty text")], ids=str)
def test_options_of_load_are_checked_before_anything_is_read(monkeypatch, options, message):
    monkeypatch.setattr("dflash_decode.session.find_model", None)
    with pytest.raises((TypeError, ValueError), match=r"^Session\.load: " + message):
        Session.load(**{"model": "smollm2"} | options)


def test_no_drafter_is_none(models):
    assert (found := Session.load(models["model"], None)).drafter is None and found.drafter_name == "none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(models):
    with pytest.raises(ValueError, match="device 'cuda' needs a GPU that torch can use; torch .* finds none"):
        Session.load(models["model"], device="cuda")


@pytest.mark.parametrize("draft", ["no/such", "~nobody-of-that-name/x", "x" * 5000, "a\0b"], ids=lambda text: text[:9])
def test_a_drafter_that_is_not_there(models, draft):
    with pytest.raises(CheckpointError, match="drafter must be a drafter's .* which does not exist") as error:
        Session.load(models["model"], draft)
    assert len(str(error.value)) < 250


def test_a_drafter_and_a_model_that_changed_places(models):
    with pytest.raises(CheckpointError, match="model must be a target model; got a drafter, which belongs in drafter"):
        Session.load(models["draft"])
    with pytest.raises(CheckpointError, match="drafter must be a DFlash drafter, .* a model with model_type 'llama'"):
        Session.load(models["model"], models["model"])


@pytest.mark.parametrize("other, hint", [
    (None, "download it too"), ("tokenizer.model", "but tokenizer.model: make it")])
def test_a_missing_tokenizer_says_what_to_do_before_the_weights_are_read(tmp_path, monkeypatch, other, hint):
    folder = tiny.write_target(tmp_path)
    (folder / "tokenizer.json").unlink()
    if other:
        (folder / other).touch()
    monkeypatch.setattr("dflash_decode.session.load_checkpoint", None)
    with pytest.raises(CheckpointError, match=f"tokenizer.json: expected this file; got none.*{hint}"):
        Session.load(folder)


# ---- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"target": "smollm2"}, "target must be a NativeTarget, an HFTarget .*; got 'smollm2', which has no vocab_size"),
    ({"target": None}, "target must be"), ({"drafter": "auto"}, "drafter must be a Drafter or None; got 'auto'"),
    ({"block_size": "4"}, "block_size must be an integer"), ({"max_batch": 0}, "max_batch must be an integer"),
    ({"max_context": 1.0}, "max_context must be"), ({"num_pages": "x"}, "num_pages must be an integer of at least 1"),
    ({"page_size": None}, "page_size must be"), ({"prefill_rows": -1}, "prefill_rows must be"),
    ({"rule": "row"}, "rule must be one of token, block; got 'row'"), ({"sample_from": 1}, "sample_from must be")],
    ids=str)
def test_arguments_of_decoder(loaded, options, message):
    with pytest.raises((TypeError, ValueError), match="^Decoder: " + message):
        Decoder(**{"target": loaded.target} | options)


@pytest.mark.parametrize("given", [None, 5, Request(0, [1], 1)], ids=str)
def test_what_stream_cannot_read_is_named_and_disturbs_nobody(loaded, given):
    decoder = Decoder(loaded.target, max_context=16)
    decoder.submit(Request("kept", [1], 1))
    with pytest.raises(TypeError, match=r"^Decoder\.stream: requests must be an iterable of Requests; got "):
        next(decoder.stream(given))
    assert [event.id for event in decoder.step()] == ["kept"]


@pytest.mark.parametrize("sizes", [{"num_pages": 10**18}, {"page_size": 10**18, "num_pages": 1}, {"max_batch": 10**18},
                                   {"num_pages": 10**30}, {"num_pages": 10**12}], ids=str)
def test_a_cache_that_no_memory_holds_is_named(loaded, sizes):
    with pytest.raises(ValueError, match="num_pages x page_size .* must fit into the memory of cpu; got .* bytes"):
        Decoder(loaded.target, **sizes)


@pytest.mark.parametrize("options, message", [
    ({"config": "config.json"}, "config must be a DraftConfig, or a config.json as a dict; got 'config.json'"),
    ({"tensors": []}, r"tensors must be a mapping of names to tensors; got \[\]"), ({"target": "x"}, "target must be"),
    ({"vocabulary": [1, 2]}, r"vocabulary must be a tensor of token ids \(n,\) or None; got \[1, 2\]"),
    ({"int8": "yes"}, "int8 must be True or False; got 'yes'")], ids=str)
def test_arguments_of_drafter(loaded, models, options, message):
    found = load_checkpoint(models["draft"])
    with pytest.raises(TypeError, match="^Drafter: " + message):
        Drafter(**{"config": found.config, "tensors": found.tensors, "target": loaded.target} | options)
