"""DSpark drafters: a Markov head over a row's most likely tokens, and blocks whose anchor's row drafts too."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from dflash_decode import Request
from dflash_decode.checkpoint.errors import CheckpointError
from dflash_decode.kv import NO_PAGE
from dflash_decode.loop import Decoder
from dflash_decode.model.config import LayerMask, Selector, read_draft_config, with_block_size
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.native import NativeTarget
from dflash_decode.packed import DraftStage, Tables
from dflash_decode.session import Session
from dflash_kernels.testing import assert_within_budget
from tests.support.decode_models import VOCAB, baseline_text, make_target
from tests.support.decode_runs import check_texts, collect
from tests.support.drafters import PAGE, Served, dense, draft_config, embedded, make, markov, random_tensors

ANCHOR_DRAFTS = {"markov_rank": 8, "architectures": ["Qwen3DSparkModel"], "markov_head_type": "vanilla",
                 "enable_confidence_head": True, "confidence_head_with_markov": True}
BONUS = ANCHOR_DRAFTS | {"sample_from_anchor": False}
LENGTHS, ANCHORS = [23, 0, 8], [3, 96, 50]


def test_the_block_is_the_anchor_and_what_the_rows_draft():
    ours, bonus = (read_draft_config(draft_config(changes)) for changes in (ANCHOR_DRAFTS, BONUS))
    assert (ours.block_size, ours.from_anchor) == (7, True) and (bonus.block_size, bonus.from_anchor) == (6, False)
    assert ours.selector == bonus.selector == Selector(8, 32, markov=True)
    assert read_draft_config(draft_config(BONUS | {"dspark_draft_topk": 5})).selector == Selector(8, 5, markov=True)


def speculators(**outer):
    flat = draft_config({})
    inner = {name: flat[name] for name in flat if name not in ("dflash_config", "num_target_layers")}
    return {"speculators_model_type": "dspark", "architectures": ["DSparkDraftModel"], "block_size": 6,
            "mask_token_id": 7, "aux_hidden_state_layer_ids": [3, 1, 4], "draft_vocab_size": VOCAB,
            "markov_rank": 8, "markov_head_type": "vanilla",
            "transformer_layer_config": inner | {"model_type": "qwen3"}, **outer}


@torch.no_grad()
def test_the_speculators_format_is_the_same_drafter():
    """Its anchor drafts where it says so alone, however the layers are named; its sliding layers are causal."""
    flat, tensors, _, plain = make(BONUS, torch.float32)
    _, target = make_target("llama")
    drafters = plain, Drafter(speculators(), tensors, target)
    drafts = [Served(drafter, LENGTHS).commit_all().draft(ANCHORS)[1] for drafter in drafters]
    assert torch.equal(*drafts)
    named = speculators(target_layer_ids=[2, 0, 3])
    del named["aux_hidden_state_layer_ids"]
    for config, from_anchor in ((speculators(), False), (named, False), (speculators(sample_from_anchor=True), True),
                                (speculators(dspark_bonus_anchor=False), True)):
        assert read_draft_config(config).from_anchor is from_anchor
    slides = speculators()
    slides["transformer_layer_config"] |= {"layer_types": ["sliding_attention"] * 3, "sliding_window": 6,
                                           "use_sliding_window": True}
    assert read_draft_config(slides).masks[0] == LayerMask(True, (5, -1))
    assert read_draft_config(slides | {"sliding_window_non_causal": True}).masks[0] == LayerMask(False, (5, 5))


@pytest.mark.parametrize(("changes", "size"), [(ANCHOR_DRAFTS, 8), (BONUS, 8), ({}, 5)])
def test_a_config_without_a_block_size_takes_the_callers(changes, size):
    """Of the anchor and its drafts, whether or not the anchor's row drafts."""
    config = draft_config(changes)
    del config["dflash_config"]["block_size"]
    with pytest.raises(ValueError, match="block_size must be an integer of at least 1; got nothing .Session.load"):
        read_draft_config(with_block_size(config, None))
    assert read_draft_config(with_block_size(config, size)).block_size == size
    assert with_block_size(draft_config(changes), 3) == draft_config(changes)


@torch.no_grad()
def test_a_markov_heads_bias_is_of_the_logits_as_they_are():
    """Engines scale and cap neither."""
    scaled = {"output_multiplier": 0.1, "final_logit_softcapping": 0.5}
    drafters = [make(changes, torch.float32)[3] for changes in (ANCHOR_DRAFTS, ANCHOR_DRAFTS | scaled)]
    assert torch.equal(*(Served(d, LENGTHS).commit_all().draft(ANCHORS)[1] for d in drafters))


def test_a_confidence_head_alone_is_not_used():
    config = draft_config({"architectures": ["Qwen3DSparkModel"], "enable_confidence_head": True})
    own = {"confidence_head.proj.weight": torch.randn(1, 64), "confidence_head.proj.bias": torch.zeros(1)}
    assert Drafter(config, random_tensors(config, torch.float32) | own, make_target("llama")[1]).selector is None


@pytest.mark.parametrize(("changes", "from_anchor"), [
    ({"architectures": ["Qwen3DSparkModel"]}, True), ({"architectures": ["Lfm2DSparkDraftModel"]}, True),
    ({"markov_rank": 8}, True), ({"projector_type": "dspark"}, True), ({"dspark_bonus_anchor": False}, True),
    ({"markov_rank": 8, "dspark_bonus_anchor": True}, False), ({"markov_rank": 8, "sample_from_anchor": False}, False),
    ({"markov_rank": 8, "aux_hidden_state_layer_ids": [3, 1, 4]}, False), ({"sample_from_anchor": True}, True),
    ({}, False),
])
def test_which_rows_draft_is_said_or_the_formats_rule(changes, from_anchor):
    assert read_draft_config(draft_config({}) | changes).from_anchor is from_anchor


@pytest.mark.parametrize(("changes", "error", "match"), [
    ({"sample_from_anchor": True, "dspark_bonus_anchor": True}, ValueError,
     "dspark_bonus_anchor must be not sample_from_anchor = true; got True"),
    ({"markov_rank": 8, "markov_head_type": "gated"}, NotImplementedError, "must be 'vanilla'.* got 'gated'"),
    ({"markov_rank": -1}, ValueError, "markov_rank must be an integer of at least 0; got -1"),
    ({"markov_rank": 8, "selector_rank": 4, "selector_top_k": 4}, ValueError,
     r"selector_rank \(of the config, or of candidate_selector/\) must be 0 beside markov_rank = 8; got 4"),
    ({"markov_rank": 8, "dspark_draft_topk": 65}, ValueError, "dspark_draft_topk must be between 1 and 64; got 65"),
    ({"enable_confidence_head": "yes"}, ValueError, "enable_confidence_head must be true or false; got 'yes'"),
    ({"architectures": ["Gemma4DSparkModel"]}, NotImplementedError, "'Gemma4DSparkModel' is not supported"),
    ({"dspark_block_size": 5}, NotImplementedError, "dspark_block_size = 5 is not supported"),
])
def test_what_is_not_read_is_refused_by_name(changes, error, match):
    with pytest.raises(error, match=match):
        read_draft_config(draft_config({}) | changes)


@pytest.mark.parametrize("width", [2, 4, 6, 7])
@pytest.mark.parametrize("changes", [ANCHOR_DRAFTS, BONUS])
@torch.no_grad()
def test_drafts_are_those_of_a_plain_walk_at_any_width(changes, width):
    _, tensors, _, drafter = make(changes, torch.float32)
    width = min(width, drafter.block_size)
    hidden, ids = Served(drafter, LENGTHS).commit_all().draft(ANCHORS, width=width)
    served = Served(drafter, LENGTHS)
    doubles, head = {name: t.double() for name, t in tensors.items()}, drafter.head.rows(torch.arange(VOCAB)).double()
    rows, skipped = (width - 1, 0) if drafter.config.from_anchor else (width, 1)
    assert hidden.shape[1] == rows
    wants, peers = [], []
    for b, features in enumerate(served.features):
        block = embedded(drafter, ANCHORS[b], rows)
        wants.append(dense(drafter.config, doubles, features.double(), block.double()))
        peers.append(dense(drafter.config, tensors, features, block))
        assert ids[b, 1:].tolist() == markov(doubles, wants[-1][skipped:] @ head.T, ANCHORS[b], 32).tolist()
    assert_within_budget(hidden, torch.stack(wants), torch.stack(peers), ulps=4.0)


@torch.no_grad()
def test_a_block_at_the_end_of_the_context_keeps_the_rows_that_have_room():
    """A mask stands at the last position that there is: one draft more than what is kept comes of it."""
    _, _, _, drafter = make(ANCHOR_DRAFTS, torch.float32)
    served = Served(drafter, LENGTHS).commit_all()
    stage = DraftStage(drafter, served.kv, 4, 7, Tables(4, served.tables.shape[1]), PAGE, room=27)
    stage.tables.set([[int(page) for page in row if page != NO_PAGE] for row in served.tables])
    got, sure = stage(ANCHORS, LENGTHS)
    _, wide = served.draft(ANCHORS, width=7)
    _, narrow = served.draft(ANCHORS, width=5)  # its pass has four rows, as a block of four tokens in a wider one
    assert [len(row) for row in got] == [len(row) for row in sure] == [3, 6, 6]
    assert got[0] == narrow[0, 1:4].tolist() and [got[1], got[2]] == wide[1:, 1:].tolist()


@torch.no_grad()
def test_a_draft_vocabulary_of_its_own_keeps_the_head_by_its_rows():
    """d2t: w1 has a row for every token, w2 for those that the head has."""
    config = draft_config(ANCHOR_DRAFTS | {"draft_vocab_size": 40})
    _, target = make_target("llama")
    tensors = random_tensors(config, torch.float32)
    kept = torch.randperm(VOCAB)[:40].sort().values
    own = {"lm_head.weight": torch.randn(40, 64), "d2t": kept - torch.arange(40),
           "confidence_head.proj.weight": torch.randn(1, 72), "confidence_head.proj.bias": torch.zeros(1)}
    drafter = Drafter(config, tensors | own, target)
    served = Served(drafter, LENGTHS).commit_all()
    _, ids = served.draft(ANCHORS, width=7)
    doubles = {name: t.double() for name, t in tensors.items()}
    wide = torch.zeros(VOCAB, 8).double().index_copy_(0, kept, doubles["markov_head.markov_w2.weight"])
    for b, features in enumerate(served.features):
        rows = dense(drafter.config, doubles, features.double(), embedded(drafter, ANCHORS[b], 6).double())
        logits = torch.full((6, VOCAB), -torch.inf).double()
        logits[:, kept] = rows @ own["lm_head.weight"].double().T
        want = markov(doubles | {"markov_head.markov_w2.weight": wide}, logits, ANCHORS[b], 32)
        assert ids[b, 1:].tolist() == want.tolist()
    with pytest.raises(ValueError, match=r"tensor markov_head.markov_w2.weight must have shape \(40, 8\)"):
        Drafter(config, tensors | own | {"markov_head.markov_w2.weight": torch.zeros(VOCAB, 8)}, target)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 7, None])
def test_texts_are_those_of_baseline_decoding(block_size, int8):
    """Greedy and sampled requests together, drafts greedy and drawn, in recorded steps."""
    _, target = make_target("llama")
    config = draft_config(ANCHOR_DRAFTS)
    drafter = Drafter(config, random_tensors(config, torch.float32), target, int8=int8)
    check_texts(target, drafter, block_size)


@pytest.mark.parametrize("changes", [ANCHOR_DRAFTS, BONUS])
@pytest.mark.parametrize("sample_from", ["greedy", "request"])
@torch.no_grad()
def test_a_head_that_knows_the_text_has_every_draft_accepted(changes, sample_from):
    """Drafts stand where verification expects them, in both loops. Without attention a token alone decides the next."""
    model, _ = make_target("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    target = NativeTarget(model.config.to_dict(), model.state_dict())
    prompt, n = [5, 9, 33], 29
    text = baseline_text(model, prompt, n)
    config = draft_config(changes | {"markov_rank": VOCAB})
    after = torch.zeros(VOCAB, VOCAB)
    for token, following in zip([prompt[-1], *text], text, strict=False):
        after[following, token] = 1e3
    tensors = random_tensors(config, torch.float32) | {
        "markov_head.markov_w1.weight": torch.eye(VOCAB), "markov_head.markov_w2.weight": after}
    drafter = Drafter(config, tensors, target, torch.tensor(sorted({*text})))
    decoder = Decoder(target, drafter, max_context=64, block_size=drafter.block_size, sample_from=sample_from)
    (got, _, lengths), = collect(decoder.stream([Request(0, prompt, n, ())])).values()
    steps, rest = divmod(n - 1, drafter.block_size)  # the first token is of the prompt's pass
    assert len({*text}) > 3 and got == text
    assert list(lengths) == [drafter.block_size] * steps + [rest] * (rest > 0)


@pytest.mark.parametrize("changes, is_one", [
    ({"speculators_model_type": "dspark"}, True), ({"architectures": ["Qwen3DSparkModel"]}, True),
    ({"block_size": 8}, False)])
def test_a_drafter_in_another_format_is_no_model(models, tmp_path, changes, is_one):
    """A target may have a block_size of its own."""
    folder = shutil.copytree(models["model"], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    if is_one:
        with pytest.raises(CheckpointError, match="model must be a target model; got a drafter"):
            Session.load(folder)
    else:
        assert Session.load(folder, None).drafter is None
