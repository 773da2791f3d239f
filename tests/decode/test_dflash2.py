"""DFlash2 drafters, with convolutions and a selector, against the dflash package's DFlash2DraftModel step by step."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_decode.checkpoint import CheckpointError, load_checkpoint
from dflash_decode.model.dflash2 import write_selector
from dflash_decode.model.drafter import Drafter
from dflash_decode.model.native import NativeTarget
from dflash_decode.session import drafter_for
from dflash_kernels import SamplingTensors, StepGraph
from dflash_kernels.testing import assert_within_budget, same_bits

pytest.importorskip("transformers")
from tests.support import tiny  # noqa: E402
from tests.support.decode_models import VOCAB, make_target  # noqa: E402
from tests.support.decode_runs import check_texts  # noqa: E402
from tests.support.drafters import PAGE, Served, draft_config, embedded, make, random_tensors  # noqa: E402

DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 5}
CASES = {
    "dflash2": DFLASH2,
    "sliding": DFLASH2 | {"layer_types": ["sliding_attention"] * 3, "sliding_window": 5, "use_sliding_window": True,
                          "is_causal": False},
    "scaled": DFLASH2 | {"conv_kernel_size": 3, "conv_group_size": 8, "selector_top_k": 16, "output_multiplier": 0.25,
                         "input_embedding_scale": 4.0, "final_logit_softcapping": 3.0},
}
LENGTHS, ANCHORS = [23, 0, 8], [3, 96, 50]


def authors(config, tensors, dtype):
    model = pytest.importorskip("dflash.model")
    from transformers import Qwen3Config

    made = Qwen3Config(**config)
    made._attn_implementation = "sdpa"
    drafter = model.DFlash2DraftModel(made).to(dtype).eval()
    drafter.load_state_dict({f"{name}.weight" if name.endswith("codebook") else name: t.to(dtype)
                             for name, t in tensors.items()})
    return drafter


def hidden_of(reference, features, rows):
    return reference(position_ids=torch.arange(len(features) + len(rows))[None], noise_embedding=rows[None],
                     target_hidden=features[None])


def scores_of(c, tensors, hidden, logits, before):
    """The candidates of one slot and their scores behind the token `before`, in float64."""
    top = logits.topk(c.selector.candidates)
    t = {name.removeprefix("candidate_selector."): tensor.double() for name, tensor in tensors.items()}
    step = t["predecessor_codebook"][before] * (t["hidden_projection.weight"] @ hidden)
    return top.indices, top.values + t["successor_codebook"][top.indices] @ step


@pytest.mark.parametrize("width", [2, 5, 6])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_drafts_equal_those_of_dflash_at_any_width(case, width):
    config, tensors, model, drafter = make(CASES[case], torch.float32)
    served = Served(drafter, LENGTHS).commit_all()
    hidden, ids = served.draft(ANCHORS, width=width)
    truth, peer = (authors(config, tensors, kind) for kind in (torch.float64, torch.float32))
    wants, peers = [], []
    for b, features in enumerate(served.features):
        rows = embedded(drafter, ANCHORS[b], width)
        want = hidden_of(truth, features.double(), rows.double())
        wants.append(want)
        peers.append(hidden_of(peer, features, rows))
        path, _, _ = truth.propose(want[:, 1:], torch.tensor([ANCHORS[b]]),
                                   lambda x: x @ model.lm_head.weight.double().T, 0.0)
        assert ids[b].tolist() == [ANCHORS[b], *path[0].tolist()]
    assert_within_budget(hidden, torch.cat(wants), torch.cat(peers), ulps=4.0, name=case)


@torch.no_grad()
def test_bfloat16_hidden_states_are_within_dflashs_own_error():
    config, tensors, _, drafter = make(DFLASH2, torch.bfloat16)
    served = Served(drafter, LENGTHS).commit_all()
    hidden, _ = served.draft(ANCHORS)
    truth, peer = (authors(config, tensors, kind) for kind in (torch.float64, torch.bfloat16))
    rows = [embedded(drafter, anchor) for anchor in ANCHORS]
    want = [hidden_of(truth, f.double(), r.double()) for f, r in zip(served.features, rows, strict=True)]
    peers = [hidden_of(peer, f, r) for f, r in zip(served.features, rows, strict=True)]
    assert_within_budget(hidden, torch.cat(want), torch.cat(peers))


@torch.no_grad()
def test_greedy_and_drawn_requests_in_one_recorded_pass():
    """A greedy request drafts as without the others; a drawn one has the q of dflash's scores, behind its own path."""
    config, tensors, model, drafter = make(DFLASH2, torch.float32)
    served = Served(drafter, LENGTHS).commit_all()
    _, greedy = served.draft(ANCHORS)
    params = SamplingTensors(torch.tensor([0.0, 0.9, 0.0]), torch.arange(3))
    work = drafter.make_draft(3, 6, served.kv, PAGE, params)
    lens, graph = torch.full((3,), 6, dtype=torch.int32), StepGraph("cpu")
    work.anchors.zero_()
    with graph.capture():
        work.run(served.lens, served.tables, lens)
    work.anchors.copy_(torch.tensor(ANCHORS))
    reference, drawn = authors(config, tensors, torch.float64), set()
    for seed in range(6):
        params.seeds.fill_(seed)
        graph.replay()
        ids, proposal = work.ids, work.proposal
        assert torch.equal(ids[[0, 2]], greedy[[0, 2]])
        drawn.add(tuple(ids[1].tolist()))
        hidden = hidden_of(reference, served.features[1].double(), embedded(drafter, ANCHORS[1]).double())[0, 1:]
        for slot, h in enumerate(hidden):
            candidates, scores = scores_of(drafter.config, tensors, h, model.lm_head.weight.double() @ h, ids[1, slot])
            own, order = proposal.ids[1, slot].sort()
            assert torch.equal(own, candidates.sort().values) and ids[1, slot + 1] in own
            q = (scores / 0.9).softmax(-1)[candidates.argsort()]
            torch.testing.assert_close(proposal.probs[1, slot][order].double(), q, atol=1e-4, rtol=1e-3)
            assert bool((proposal.probs[[0, 2], slot].amax(-1) == 1).all())
    assert len(drawn) > 3


@torch.no_grad()
def test_a_request_drafts_the_same_bits_alone_and_in_a_batch():
    _, _, _, drafter = make(DFLASH2, torch.bfloat16)
    served = Served(drafter, LENGTHS).commit_all()
    hidden, ids = served.draft(ANCHORS)
    narrow, few = served.draft(ANCHORS, width=6, block_lens=[6, 3, 0])
    assert same_bits(narrow[0], hidden[0]) and torch.equal(few[0], ids[0])
    for b, n in enumerate(LENGTHS):
        alone = Served(drafter, [n])
        alone.features = [served.features[b]]
        one, one_ids = alone.commit_all(width=3).draft([ANCHORS[b]])
        assert same_bits(one[0], hidden[b]) and torch.equal(one_ids[0], ids[b])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 6])
def test_texts_are_those_of_baseline_decoding(block_size, int8):
    """Greedy and sampled requests together, drafts greedy and drawn, in recorded steps."""
    _, target = make_target("llama")
    drafter = Drafter(draft_config(DFLASH2), random_tensors(draft_config(DFLASH2), torch.float32), target, int8=int8)
    check_texts(target, drafter, block_size)


def test_confidence_is_the_selectors_share_of_its_candidates():
    _, tensors, _, drafter = make(DFLASH2, torch.float32)
    served = Served(drafter, LENGTHS).commit_all()
    work = drafter.make_draft(3, 6, served.kv, PAGE)
    work.anchors.copy_(torch.tensor(ANCHORS))
    work.run(served.lens, served.tables, torch.full((3,), 6, dtype=torch.int32))
    hidden, logits = work.masked.double(), work.masked.double() @ drafter.head.rows(torch.arange(VOCAB)).double().T
    for at in range(15):
        b, slot = divmod(at, 5)
        _, scores = scores_of(drafter.config, tensors, hidden[at], logits[at], work.ids[b, slot])
        assert abs(scores.softmax(-1).max().item() - work.confidences()[b, slot].item()) < 1e-4


def test_a_restricted_vocabulary_keeps_codebooks_of_the_target_s_ids():
    _, target = make_target("llama")
    config = draft_config(DFLASH2)
    tensors = random_tensors(config, torch.float32)
    kept = torch.randperm(VOCAB)[:40].sort().values
    everything = Drafter(config, tensors, target, torch.arange(VOCAB))
    whole, few = Drafter(config, tensors, target), Drafter(config, tensors, target, kept)
    drafts = [Served(d, LENGTHS).commit_all().draft(ANCHORS)[1] for d in (everything, whole, few)]
    assert torch.equal(drafts[0], drafts[1]) and bool(torch.isin(drafts[2][:, 1:], kept).all())
    assert not torch.equal(drafts[1], drafts[2])


@pytest.mark.parametrize("name,shape", [
    ("layers.0.attention_conv.base_kernel", (2, 3, 64)), ("layers.2.mlp_conv.kernel_projection.weight", (8, 64)),
    ("candidate_selector.predecessor_codebook", (VOCAB - 1, 8)),
    ("candidate_selector.hidden_projection.weight", (7, 64))])
def test_misshapen_and_missing_tensors_are_refused_by_name(name, shape):
    _, target = make_target("llama")
    config = draft_config(DFLASH2)
    tensors = random_tensors(config, torch.float32)
    with pytest.raises(ValueError, match=rf"tensor {name} must have shape .*; got \({shape[0]}"):
        Drafter(config, tensors | {name: torch.zeros(shape)}, target)
    with pytest.raises(ValueError, match=f"tensor {name} must be there"):
        Drafter(config, {key: t for key, t in tensors.items() if key != name}, target)


def test_a_selector_beside_the_weights_of_another_drafter(tmp_path):
    """It chooses as one in the checkpoint does; a folder without one drafts the most likely tokens."""
    stored, folder = load_checkpoint(tiny.write_target(tmp_path / "target")), tiny.write_drafter(tmp_path / "draft")
    target = NativeTarget(stored.config, stored.tensors)
    generator, vocabulary = torch.Generator().manual_seed(5), torch.arange(1, target.vocab_size, 2)
    (folder / "draft_vocabulary.json").write_text(json.dumps({"token_ids": vocabulary.tolist()}))

    def random(*shape):
        return (torch.randn(shape, generator=generator) * 2).bfloat16()

    before, after, hidden = random(len(vocabulary), 6), random(len(vocabulary), 6), random(6, target.hidden_size)
    plain = drafter_for(target, load_checkpoint(folder), "model", lambda text: None)
    file = write_selector(folder, before, after, hidden, 5)
    beside = drafter_for(target, load_checkpoint(folder), "model", lambda text: None)
    whole = torch.zeros(2, target.vocab_size, 6).bfloat16()
    whole[:, vocabulary] = torch.stack((before, after))
    found = load_checkpoint(folder)
    inside = Drafter(found.config | {"selector_rank": 6, "selector_top_k": 5}, dict(found.tensors) | {
        "candidate_selector.predecessor_codebook": whole[0], "candidate_selector.successor_codebook": whole[1],
        "candidate_selector.hidden_projection.weight": hidden}, target, vocabulary)
    drafts = [Served(drafter, LENGTHS).commit_all().draft([3, 5, 6], width=4)[1] for drafter in (beside, inside, plain)]
    assert torch.equal(drafts[0], drafts[1]) and not torch.equal(drafts[0], drafts[2])
    kept = load_file(file)
    for changes, message in (
            ({"candidates": torch.tensor([1.5])}, "candidates must be one integer; got"),
            ({"candidates": torch.tensor([70])}, "selector_top_k must be between 1 and"),
            ({"more": torch.ones(1)}, "tensors must be candidate_selector.hidden_projection.weight, .*; got .*more"),
            ({"candidate_selector.hidden_projection.weight": torch.ones(6)}, r"must be \(rank, hidden_size\); got \(6"),
            ({"candidate_selector.successor_codebook": torch.ones(7, 6)}, r"must be \(\d+, 6\), .* got \(7, 6")):
        save_file(kept | changes, file)
        with pytest.raises(CheckpointError, match=message):
            drafter_for(target, load_checkpoint(folder), "model", lambda text: None)
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        drafter_for(target, load_checkpoint(folder), "model", lambda text: None)
