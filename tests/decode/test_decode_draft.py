"""The drafter against dflash's own DFlashDraftModel, and against a dense one in torch for what that lacks."""

import pytest
import torch

from dflash_decode.checkpoint import CheckpointError
from dflash_decode.model.config import read_draft_config
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.vocabulary import read_mask_embedding, read_vocabulary
from dflash_kernels.testing import assert_within_budget, same_bits

pytest.importorskip("transformers")
from tests.support.decode_models import VOCAB, YARN, make_target  # noqa: E402
from tests.support.drafters import (  # noqa: E402
    HIDDEN,
    PAGE,
    TARGET_LAYER_IDS,
    Served,
    dense,
    dflash_model,
    draft_config,
    embedded,
    make,
    random_tensors,
)

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
BY_DFLASH = {
    "full": {},
    "sliding-causal": {"layer_types": SLIDING, "sliding_window": 6, "use_sliding_window": True},
    "sliding-symmetric": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 5, "use_sliding_window": True,
                          "is_causal": False},
    "causal": {"is_causal": True},
    "biased-yarn": {"attention_bias": True, "rope_parameters": YARN},
    "scaled": {"input_embedding_scale": 4.0, "output_multiplier": 0.25, "final_logit_softcapping": 3.0},
}
BEYOND_DFLASH = {
    "sinks": {"attention_sink_bias": True},
    "value-scale": {"attention_value_scale": 0.707, "attention_bias": True},
    "partial-interleaved": {"partial_rotary_factor": 0.5, "rope_interleaved": True},
    "swa": {"use_swa": True, "swa_window_size": 4},
}
LENGTHS, ANCHORS, BLOCKS = [23, 0, 8, 1, 17], [3, 96, 50, 0, 11], [6, 6, 6, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", BY_DFLASH)
@torch.no_grad()
def test_hidden_states_and_tokens_equal_those_of_dflash(case, dtype):
    config, tensors, model, drafter = make(BY_DFLASH[case], dtype)
    served = Served(drafter, LENGTHS).commit_all()
    hidden, ids = served.draft(ANCHORS, BLOCKS)
    truth = dflash_model(config, {k: t.double() for k, t in tensors.items()}, torch.float64)
    peer = dflash_model(config, tensors, dtype)
    made = []
    for b, (n, width) in enumerate(zip(LENGTHS, BLOCKS, strict=True)):
        out = [hidden[b, :width], ids[b, 1:width]]
        for reference, kind in ((truth, torch.float64), (peer, dtype)) if width else ():
            head, rows = model.lm_head.weight.to(kind), embedded(drafter, ANCHORS[b], width).to(kind)
            h = reference(position_ids=torch.arange(n + width)[None], noise_embedding=rows[None],
                          target_hidden=served.features[b][None].to(kind))[0]
            out += [h, reference.compute_logits(h[1:], lambda x, head=head: x @ head.T)]
        made += [out] if width else []
    got, tokens, want, logits, peers, peer_logits = (torch.cat(part) for part in zip(*made, strict=True))
    assert_within_budget(got, want, peers, name=case)
    top = logits.topk(2, -1)
    sure = top.values[:, 0] - top.values[:, 1] > 4 * (peer_logits.double() - logits).abs().max()
    assert torch.equal(tokens[sure], top.indices[:, 0][sure]) and ids[:, 0][:4].tolist() == ANCHORS[:4]
    # A guess counts where no rounding can turn it: all in float32.
    assert sure.sum() >= (17 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", BEYOND_DFLASH)
@torch.no_grad()
def test_fields_that_dflash_lacks_equal_a_dense_drafter(case, dtype):
    """p14 with value-scale: context and own V are scaled alike."""
    config, tensors, _, drafter = make(BEYOND_DFLASH[case], dtype)
    served = Served(drafter, LENGTHS).commit_all()
    hidden, _ = served.draft(ANCHORS)
    doubles = {k: t.double() for k, t in tensors.items()}
    for b, features in enumerate(served.features):
        rows = embedded(drafter, ANCHORS[b])
        want = dense(drafter.config, doubles, features.double(), rows.double())
        peers = dense(drafter.config, tensors, features, rows)
        assert_within_budget(hidden[b], want, peers, name=f"{case} request {b}")


@torch.no_grad()
def test_confidences_are_the_drafter_s_own_probabilities():
    _, _, model, drafter = make({}, torch.float32)
    served = Served(drafter, LENGTHS).commit_all()
    hidden, ids = served.draft(ANCHORS)
    found = served.work.confidences()
    logits = hidden[:, 1:].flatten(0, 1).double() @ model.lm_head.weight.double().T
    want = logits.softmax(-1).gather(-1, ids[:, 1:].reshape(-1, 1)).view(found.shape)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_dense_drafter_is_dflashs():
    for changes in BY_DFLASH.values():
        config = draft_config(changes)
        tensors = random_tensors(config, torch.float64)
        features, rows = torch.randn(9, len(TARGET_LAYER_IDS) * HIDDEN).double(), torch.randn(6, HIDDEN).double()
        want = dflash_model(config, tensors, torch.float64)(
            position_ids=torch.arange(15)[None], noise_embedding=rows[None], target_hidden=features[None])[0]
        got = dense(read_draft_config(config), tensors, features, rows)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, BY_DFLASH["sliding-causal"], BEYOND_DFLASH["sinks"]])
def test_a_request_drafts_the_same_bits_alone_and_in_a_batch_and_twice(changes):
    _, _, _, drafter = make(changes, torch.bfloat16)
    served = Served(drafter, LENGTHS).commit_all()
    hidden, ids = served.draft(ANCHORS)
    again, _ = served.draft(ANCHORS)
    assert same_bits(hidden, again)
    for b, n in enumerate(LENGTHS):
        alone = Served(drafter, [n])
        alone.features = [served.features[b]]
        one, one_ids = alone.commit_all(width=3).draft([ANCHORS[b]])
        assert same_bits(one[0], hidden[b]) and torch.equal(one_ids[0], ids[b])


def test_context_written_three_positions_off_changes_the_draft():
    _, _, _, drafter = make({}, torch.float32)
    right, _ = Served(drafter, [23, 9]).commit_all().draft([3, 4])
    wrong, _ = Served(drafter, [23, 9]).commit_all(shift=3).draft([3, 4])
    ids = [Served(drafter, [23, 9]).commit_all(shift=s).draft([3, 4])[1] for s in (0, 3)]
    assert not torch.equal(*ids) and (right - wrong).abs().max() > 0.1


def test_p17_rows_that_were_not_committed_leave_no_trace():
    _, _, _, drafter = make({}, torch.bfloat16)
    served = Served(drafter, [9, 0, 4])
    context = drafter.make_context(3, 5, served.kv)
    features, counts = (
        torch.randn(15, len(TARGET_LAYER_IDS) * HIDDEN).bfloat16(),
        torch.tensor([2, 0, 5], dtype=torch.int32),
    )
    positions = torch.arange(5).expand(3, 5).contiguous()
    slots = served.tables.long().gather(1, positions // PAGE) * PAGE + positions % PAGE
    context.run(features, positions, slots, counts)
    written = torch.zeros(64 * PAGE, dtype=torch.bool)
    written[torch.cat([slots[b, :n] for b, n in enumerate(counts.tolist())])] = True
    for cache in served.kv:
        for side in (cache.k, cache.v):
            assert torch.equal(~side.reshape(64 * PAGE, -1).isnan().any(1), written)


def test_p36_the_multiplier_comes_first_and_then_the_cap():
    """Where the cap flattens logits to one value, the first index wins; without either field another would."""
    config, tensors, model, drafter = make({"output_multiplier": 500.0, "final_logit_softcapping": 2.0}, torch.float32)
    hidden, ids = Served(drafter, LENGTHS).commit_all().draft(ANCHORS)
    with torch.no_grad():
        logits = dflash_model(config, tensors, torch.float32).compute_logits(hidden[:, 1:], model.lm_head)
    assert (logits == 2.0).sum(-1).min() > 5
    assert torch.equal(ids[:, 1:], logits.argmax(-1))


def test_p12_the_block_starts_with_its_anchor():
    _, _, _, drafter = make({}, torch.float32)
    drafts = [Served(drafter, [5]).commit_all().draft([anchor])[1] for anchor in (3, 60)]
    assert [d[0, 0].item() for d in drafts] == [3, 60] and not torch.equal(drafts[0][:, 1:], drafts[1][:, 1:])


def test_p35_d2t_is_an_offset_and_padded_ids_never_win():
    config = draft_config({"draft_vocab_size": 40})
    _, target = make_target("llama")
    tensors = random_tensors(config, torch.float32)
    kept = torch.randperm(VOCAB)[:40].sort().values
    tensors |= {"d2t": kept - torch.arange(40), "lm_head.weight": torch.randn(40, HIDDEN)}
    drafter = Drafter(config, tensors, target)
    hidden, ids = Served(drafter, [9, 2]).commit_all().draft([1, 2])
    want = kept[(hidden[:, 1:] @ tensors["lm_head.weight"].T).argmax(-1)]
    assert torch.equal(ids[:, 1:], want) and ids[:, 0].tolist() == [1, 2]
    tensors["d2t"] = tensors["d2t"] + VOCAB
    with pytest.raises(ValueError, match=f"d2t must be offsets to ids below {VOCAB}; got ids from"):
        Drafter(config, tensors, target)
    head = tensors.pop("lm_head.weight")
    with pytest.raises(ValueError, match="lm_head.weight must be there, as d2t names the tokens of its rows; got"):
        Drafter(config, tensors, target)
    tensors["lm_head.weight"] = head
    del tensors["d2t"]
    with pytest.raises(ValueError, match="tensor d2t must be there with shape"):
        Drafter(config, tensors, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_vocabulary_is_those_rows_of_the_targets_head(dtype):
    config = draft_config({})
    _, target = make_target("llama", dtype=dtype)
    tensors, kept = random_tensors(config, dtype), torch.randperm(VOCAB)[:37].sort().values
    hidden, whole = Served(Drafter(config, tensors, target), [9, 2]).commit_all().draft([1, 2])
    _, ids = Served(Drafter(config, tensors, target, kept), [9, 2]).commit_all().draft([1, 2])
    logits = hidden[:, 1:].float() @ target.head.rows(torch.arange(VOCAB)).float().T
    best, want = logits[..., kept].topk(2).values, kept[logits[..., kept].argmax(-1)]
    clear = best[..., 0] - best[..., 1] > 1e-2
    assert clear.any() and torch.equal(ids[:, 1:][clear], want[clear]) and not torch.equal(ids, whole)
    assert torch.isin(ids[:, 1:], kept).all() and ids[:, 0].tolist() == [1, 2]
    for wrong in ([VOCAB], [-1, 3], [[1]], []):
        with pytest.raises(ValueError, match="draft vocabulary must be ids"):
            Drafter(config, tensors, target, torch.tensor(wrong, dtype=torch.int64))
    with pytest.raises(ValueError, match="must come with the target's head"):
        Drafter(config, tensors | {"lm_head.weight": torch.randn(VOCAB, HIDDEN).to(dtype)}, target, kept)


def test_a_draft_vocabulary_is_read_beside_the_weights(tmp_path):
    assert read_vocabulary(tmp_path) is None
    file = tmp_path / "draft_vocabulary.json"
    file.write_text('{"token_ids": [5, 2, 9]}')
    assert read_vocabulary(tmp_path).tolist() == [2, 5, 9]
    for bad in ('{"token_ids": []}', '{"token_ids": [1, 1]}', '{"token_ids": [1.5]}', '{"ids": [1]}', "[1]", "{"):
        file.write_text(bad)
        with pytest.raises(CheckpointError, match="draft_vocabulary.json"):
            read_vocabulary(tmp_path)


def test_p34_a_head_padded_beyond_the_target_drafts_known_ids_only():
    config = draft_config({"vocab_size": VOCAB + 31})
    _, target = make_target("llama")
    head = torch.randn(VOCAB + 31, HIDDEN)
    head[VOCAB:] *= 100
    drafter = Drafter(config, random_tensors(config, torch.float32) | {"lm_head.weight": head}, target)
    _, ids = Served(drafter, [9, 2]).commit_all().draft([1, 2])
    assert int(ids.max()) < VOCAB


def test_tensors_that_are_missing_unexpected_or_of_another_shape_are_named():
    config, (_, target) = draft_config({}), make_target("llama")
    good = random_tensors(config, torch.float32)
    name = "layers.1.self_attn.k_norm.weight"
    with pytest.raises(ValueError, match=rf"tensor {name} must be there with shape \(16,\); got nothing"):
        Drafter(config, {k: t for k, t in good.items() if k != name}, target)
    with pytest.raises(ValueError, match=r"tensor fc.weight must have shape \(64, 192\); got \(64, 128\)"):
        Drafter(config, {**good, "fc.weight": good["fc.weight"][:, :128]}, target)
    with pytest.raises(ValueError, match="tensor candidate_selector.x must not be there .* got 1 such"):
        Drafter(config, {**good, "candidate_selector.x": torch.zeros(1)}, target)
    with pytest.raises(ValueError, match="tensor layers.0.self_attn.q_proj.bias must be there"):  # P41
        Drafter({**config, "attention_bias": True}, good, target)
    Drafter(config, {f"model.{k}": t for k, t in good.items()}, target)


def test_a_drafter_for_another_target_is_refused():
    config, (_, target) = draft_config({}), make_target("llama")
    tensors = random_tensors(config, torch.float32)
    with pytest.raises(ValueError, match="num_target_layers must be the target's, 4; got 30"):
        Drafter({**config, "num_target_layers": 30}, tensors, target)
    with pytest.raises(ValueError, match="target_hidden_size must be the target's, 64; got 32"):
        Drafter({**config, "target_hidden_size": 32}, tensors, target)
    nested = {**config["dflash_config"], "mask_token_id": VOCAB}
    with pytest.raises(ValueError, match=f"mask_token_id must be below the target's vocabulary of {VOCAB}; got"):
        Drafter({**config, "dflash_config": nested}, tensors, target)


def test_a_mask_token_beyond_the_drafters_own_embedding_is_refused():
    """Read as zeros it would only cost acceptance, which nobody sees."""
    config, (_, target) = draft_config({"vocab_size": VOCAB - 7}), make_target("llama")
    tensors = random_tensors(config, torch.float32) | {"embed_tokens.weight": torch.randn(VOCAB - 7, HIDDEN)}
    Drafter(config, tensors, target)
    nested = {**config["dflash_config"], "mask_token_id": VOCAB - 7}
    with pytest.raises(ValueError, match=f"mask_token_id must be below the {VOCAB - 7} rows of embed_tokens.weight"):
        Drafter({**config, "dflash_config": nested}, tensors, target)


def test_p37_a_pickled_mask_embedding_is_refused_and_not_ignored(tmp_path):
    read_mask_embedding(tmp_path)
    (tmp_path / "mask_embedding.pt").touch()
    with pytest.raises(NotImplementedError, match="mask_embedding.pt, .* safetensors only; store it as the"):
        read_mask_embedding(tmp_path)
