"""transformers' own generate with a drafter: the same results as without it."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from dflash_decode import DraftedGenerate  # noqa: E402
from tests.support import tiny  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_target(tmp_path_factory.mktemp("target"))
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    return DraftedGenerate(tiny.write_drafter(tmp_path_factory.mktemp("drafter")))


PROMPT = torch.tensor([[72, 5, 90, 33, 7, 18]])
PADDED = torch.tensor([[0, 0, 72, 5, 90], [9, 8, 7, 6, 5], [0, 0, 0, 0, 44]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])


class Heard(BaseStreamer):
    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.append(value.tolist())

    def end(self):
        self.said.append(None)


@pytest.mark.parametrize("options", [
    {}, {"repetition_penalty": 1.3}, {"min_new_tokens": 12, "eos_token_id": [7, 263]}, {"eos_token_id": 100},
    {"return_dict_in_generate": True},
], ids=["greedy", "penalty", "min tokens", "stop", "dict"])
def test_greedy_results_are_those_of_generate(model, drafted, options):
    attention = model.config._attn_implementation
    for inputs in ({"inputs": PROMPT}, {"inputs": PADDED, "attention_mask": MASK, "pad_token_id": 0}):
        want = model.generate(**inputs, max_new_tokens=24, do_sample=False, **options)
        found = model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=drafted, **options)
        if options.get("return_dict_in_generate"):
            want, found = want.sequences, found.sequences
        assert torch.equal(found, want)
    assert model.config._attn_implementation == attention and drafted._known[0] is model


@pytest.mark.parametrize("through", ["the weight", "its data"])
def test_other_weights_are_seen(model, drafted, through):
    """What is written through `.data` leaves the weight's version as it was."""
    weight = model.get_output_embeddings().weight
    weight, now = (weight.data, weight._version) if through == "its data" else (weight, None)
    with torch.no_grad():
        model.generate(PROMPT, max_new_tokens=12, do_sample=False, custom_generate=drafted)
        weight.mul_(-1.0)
        try:
            assert now is None or model.get_output_embeddings().weight._version == now
            want = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
            found = model.generate(PROMPT, max_new_tokens=12, do_sample=False, custom_generate=drafted)
            assert torch.equal(found, want)
        finally:
            weight.mul_(-1.0)


class EndsAfter(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_criteria_of_the_caller_end_an_answer_where_they_do_in_generate(model, drafted):
    whole = model.generate(PROMPT, max_new_tokens=20, do_sample=False)[0, PROMPT.shape[1]:].tolist()
    criteria = StoppingCriteriaList([EndsAfter(whole[9])])
    want = model.generate(PROMPT, max_new_tokens=20, do_sample=False, stopping_criteria=criteria)
    assert PROMPT.shape[1] < want.shape[1] <= PROMPT.shape[1] + 10
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20, do_sample=False, stopping_criteria=criteria,
                                      custom_generate=drafted), want)


@pytest.mark.parametrize("of", [
    lambda text: MaxLengthCriteria(PROMPT.shape[1] + 7), lambda text: MaxLengthCriteria(PROMPT.shape[1]),
    lambda text: EosTokenCriteria(text[9]),
], ids=["length", "no length", "stop"])
def test_the_caller_s_criteria_take_the_place_of_generate_s_own(model, drafted, of):
    whole = model.generate(PROMPT, max_new_tokens=20, do_sample=False)[0, PROMPT.shape[1]:].tolist()
    how = {"max_new_tokens": 20, "do_sample": False, "stopping_criteria": StoppingCriteriaList([of(whole)])}
    want = model.generate(PROMPT, **how)
    assert want.shape[1] < PROMPT.shape[1] + 20
    assert torch.equal(model.generate(PROMPT, custom_generate=drafted, **how), want)


def test_min_new_tokens_holds_back_the_stop_tokens_of_the_call(model, drafted):
    """Not those of the caller's criterion, as in generate."""
    whole = model.generate(PROMPT, max_new_tokens=20, do_sample=False)[0, PROMPT.shape[1]:].tolist()
    how = {"max_new_tokens": 20, "min_new_tokens": 12, "do_sample": False, "eos_token_id": 250,
           "stopping_criteria": StoppingCriteriaList([EosTokenCriteria(whole[5])])}
    want = model.generate(PROMPT, **how)
    assert want.shape[1] < PROMPT.shape[1] + 12
    assert torch.equal(model.generate(PROMPT, custom_generate=drafted, **how), want)


def test_ended_rows_are_padded_as_in_generate(model, drafted):
    """With the stop token, where there is no token for it."""
    inputs = {"inputs": PADDED, "attention_mask": MASK}
    text = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, PADDED.shape[1]:].tolist()
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": text[3]}
    want = model.generate(**inputs, **how)
    assert want[0, -1] == text[3] and want.shape[1] > PADDED.shape[1] + 4
    assert torch.equal(model.generate(**inputs, custom_generate=drafted, **how), want)


def test_a_greedy_answer_stays_greedy_with_a_temperature(model, drafted):
    how = {"max_new_tokens": 20, "do_sample": False, "logits_processor": [TemperatureLogitsWarper(5.0)]}
    assert torch.equal(model.generate(PROMPT, custom_generate=drafted, **how), model.generate(PROMPT, **how))


def test_a_model_in_training_is_evaluated_in_every_call(model, drafted):
    modes = []
    hook = model.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    try:
        model.train()
        for _ in range(2):
            model.generate(PROMPT, max_new_tokens=4, do_sample=False, custom_generate=drafted)
            assert modes and not any(modes) and model.training
    finally:
        hook.remove()
        model.eval()


def test_sampling_follows_torch_s_seed_and_its_filters(model, drafted):
    def drawn(seed, **options):
        torch.manual_seed(seed)
        return model.generate(PROMPT, max_new_tokens=16, do_sample=True, custom_generate=drafted, **options)

    wide = {"temperature": 5.0, "top_k": 0}
    assert torch.equal(drawn(1, **wide), drawn(1, **wide)) and not torch.equal(drawn(1, **wide), drawn(2, **wide))
    greedy = model.generate(PROMPT, max_new_tokens=16, do_sample=False)
    for narrow in ({"top_k": 1}, {"top_k": 0, "top_p": 1e-9}, {"top_k": 0, "min_p": 1.0}, {"temperature": 1e-6}):
        assert torch.equal(drawn(3, **narrow), greedy), narrow
    answers = model.generate(PROMPT, max_new_tokens=16, do_sample=True, custom_generate=drafted, num_return_sequences=3,
                             **wide)
    assert len({tuple(row) for row in answers.tolist()}) == 3


@pytest.mark.parametrize("options,words", [
    ({"num_beams": 2}, "num_beams must be 1; got 2"),
    ({"use_cache": False}, "use_cache must be True; got False"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens must be off; got 3"),
    ({"speculation_type": "dflash"}, "speculation_type must be off; got .dflash."),
    ({"inputs": PADDED, "attention_mask": MASK, "streamer": Heard()}, "streamer must be given with one prompt; got 3"),
    ({"output_scores": True, "return_dict_in_generate": True}, "output_scores must be off; got True"),
    ({"no_repeat_ngram_size": 2}, "logits processors must be .*; got NoRepeatNGramLogitsProcessor"),
    ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "attention_mask must have its zeros on the left"),
    ({"do_sample": True, "top_p": 0.8, "min_p": 0.1}, "min_p must be 0 with top_p, .*; got 0.1 and 0.8"),
    ({"do_sample": True, "temperature": 0.5, "logits_processor": [TopPLogitsWarper(0.8)]},
     "logits processors must be in the order Rep.*; got TopPLogitsWarper, TemperatureLogitsWarper"),
    ({"max_new_tokens": 1000}, "prompts and max_new_tokens must fit into the model's context of .* tokens; got 1006"),
])
def test_what_it_cannot_follow_is_refused_before_decoding(model, drafted, options, words):
    attention = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"DraftedGenerate: {words}"):
        model.generate(**{"inputs": PROMPT, "max_new_tokens": 4} | options, custom_generate=drafted)
    assert model.config._attn_implementation == attention


def test_an_assistant_model_is_refused(model, drafted):
    with pytest.raises(ValueError, match="DraftedGenerate: assistant_model must be None, as .*; got a Ll"):
        model.generate(PROMPT, max_new_tokens=4, custom_generate=drafted, assistant_model=model)


def test_a_streamer_hears_what_it_hears_in_generate(model, drafted):
    heard = []
    for how in ({}, {"custom_generate": drafted}):
        streamer = Heard()
        model.generate(PROMPT, max_new_tokens=9, do_sample=False, streamer=streamer, **how)
        heard.append(streamer.said)
    assert heard[0] == heard[1] and len(heard[0]) == 11 and heard[0][-1] is None


def test_a_drafter_s_mask_token_can_be_a_text(model, tmp_path):
    config = {"dflash_config": {"mask_token": "<u>", "target_layer_ids": [0, 2]}}
    folder = tiny.write_drafter(tmp_path, **config)
    with pytest.raises(ValueError, match="tokenizer must be given, as the drafter has its mask token as text, '<u>'"):
        model.generate(PROMPT, max_new_tokens=4, do_sample=False, custom_generate=DraftedGenerate(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    found = model.generate(PROMPT, max_new_tokens=4, do_sample=False,
                           custom_generate=DraftedGenerate(folder, tokenizer=tokenizer))
    assert torch.equal(found, model.generate(PROMPT, max_new_tokens=4, do_sample=False))


def test_wrong_arguments_and_files_are_errors_and_leave_the_model_as_it_was(model, tmp_path):
    for given, words in (({"drafter": 3}, "drafter must be a path or a name"),
                         ({"drafter": "x", "max_batch": 0}, "max_batch must be"),
                         ({"drafter": "x", "drafter_weights": "4"}, "drafter_weights must be one of")):
        with pytest.raises((TypeError, ValueError), match=words):
            DraftedGenerate(**given)
    attention = model.config._attn_implementation
    with pytest.raises(ValueError, match="^DraftedGenerate: drafter: .* does not exist"):
        model.generate(PROMPT, max_new_tokens=4, custom_generate=DraftedGenerate(tmp_path / "nothing"))
    assert model.config._attn_implementation == attention
