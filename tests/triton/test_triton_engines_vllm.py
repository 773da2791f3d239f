"""Our ops and the plugin's V2 hook against the functions of vLLM's V2 runner, taken from its wheel and run in Triton's
interpreter."""

import types

import pytest
import torch

from bench.peers import gpu_peers
from dflash_engines.hooks import LEFT
from dflash_engines.vllm import verify_v2
from dflash_kernels import prepare_block
from tests.support.engine_files import source


def inputs_of_vllm(theirs, block_table, contexts, anchors, rows, rejected, steps=3, max_reqs=5, page=4, max_len=40):
    """Everything that prepare_dflash_inputs of the V2 runner writes, for requests whose target pass ended with
    `rejected` rows that do not count. contexts: tokens before each block."""
    lens = torch.tensor([3, 4, 2])
    ends = lens.cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    positions = torch.cat([torch.arange(c + r - n, c + r) for c, r, n in zip(contexts, rejected, lens, strict=True)])
    width, most = steps + 1, 32
    out = {name: torch.full((n,), 99, dtype=dtype) for name, n, dtype in (
        ("input_ids", most, torch.int32), ("positions", most, torch.int64), ("is_padding", most, torch.bool),
        ("query_start_loc", max_reqs + 1, torch.int32), ("seq_lens", max_reqs, torch.int32),
        ("query_slots", most, torch.int64), ("context_positions", 9, torch.int64), ("context_slots", 9, torch.int64),
        ("sample_indices", max_reqs * steps, torch.int64), ("sample_pos", max_reqs * steps, torch.int64),
        ("sample_rows", max_reqs * steps, torch.int64), ("temperature", max_reqs, torch.float32),
        ("seeds", max_reqs, torch.int64))}
    last = torch.full((max_reqs,), 98, dtype=torch.int64)
    last[rows] = anchors
    batch = types.SimpleNamespace(num_reqs=3, num_scheduled_tokens=lens.numpy(), positions=positions,
                                  query_start_loc=starts.int(), idx_mapping=rows.int())
    theirs.prepare_dflash_inputs(
        types.SimpleNamespace(**out), out["query_slots"], out["context_positions"], out["context_slots"],
        out["sample_indices"], out["sample_pos"], out["sample_rows"], out["temperature"], out["seeds"], batch,
        torch.ones(3, dtype=torch.int32), torch.tensor(rejected, dtype=torch.int32), last, torch.zeros_like(last),
        torch.arange(max_reqs) / 8, torch.arange(max_reqs), block_table, page, 0, 1, 1, 77, width, steps, max_reqs,
        most, max_len)
    return out, positions


@pytest.fixture
def speculator():
    path = "v1/worker/gpu/spec_decode/dflash/speculator.py"
    source("vllm", path)
    return gpu_peers.load("vllm", path)


def test_prepare_is_vllms_where_they_overlap(speculator):
    """Not hooked: three of the thirteen things that its one launch writes, and those for tokens that have a page."""
    contexts, anchors, rows = [9, 15, 2], torch.tensor([11, 12, 13]), torch.tensor([4, 0, 2])
    table = torch.tensor([[5, 7, 9, 3, 0], [8, 2, 4, 6, 1], [10, 11, 0, 0, 0]], dtype=torch.int32)
    out, positions = inputs_of_vllm(speculator, table, contexts, anchors, rows, [0, 2, 1])
    made = prepare_block(anchors, torch.tensor(contexts, dtype=torch.int32), 4, 77, page_size=4,
                         page_table=table.where(table > 0, -1))  # its page 0 is nobody's
    assert torch.equal(made.ids.flatten().int(), out["input_ids"][:12])
    assert torch.equal(made.positions.flatten(), out["positions"][:12])
    assert torch.equal(made.slots.flatten(), out["query_slots"][:12])
    # What is left to it: rows of the context, where a rejected one is kept out of the cache, ...
    assert positions[out["context_slots"] >= 0].tolist() == [6, 7, 8, 13, 14, 1]
    assert out["context_slots"][5:7].tolist() == [-1, -1] and out["context_positions"][5:7].tolist() == [0, 0]
    # ... where to sample, for whom, lengths, and the padding of a graph's buffers.
    assert out["sample_indices"].tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11] + [0] * 6
    assert out["sample_rows"].tolist() == [4, 4, 4, 0, 0, 0, 2, 2, 2] + [-1] * 6
    assert out["sample_pos"][:9].tolist() == [10, 11, 12, 16, 17, 18, 3, 4, 5]
    assert out["seq_lens"].tolist() == [13, 19, 6, 0, 0] and out["query_start_loc"].tolist() == [0, 4, 8, 12, 12, 12]
    assert out["is_padding"].tolist() == [False] * 12 + [True] * 20 and (out["query_slots"][12:] == -1).all()
    assert out["temperature"][rows].tolist() == [0.5, 0, 0.25] and out["seeds"][rows].tolist() == rows.tolist()


def test_prepare_differs_from_vllms_at_the_longest_text(speculator):
    """Past the model's length it repeats the last position and writes to the table's last page, ours writes nothing."""
    contexts, anchors, rows = [18, 17, 2], torch.tensor([11, 12, 13]), torch.tensor([4, 0, 2])
    table = torch.arange(1, 16, dtype=torch.int32).view(3, 5)
    out, _ = inputs_of_vllm(speculator, table, contexts, anchors, rows, [0, 0, 0], max_len=20)
    made = prepare_block(anchors, torch.tensor(contexts, dtype=torch.int32), 4, 77, page_table=table, page_size=4)
    assert out["positions"][:4].tolist() == [18, 19, 19, 19] and made.positions[0].tolist() == [18, 19, 20, 21]
    assert out["query_slots"][:4].tolist() == [22, 23, 20, 21] and made.slots[0].tolist() == [22, 23, -1, -1]
    assert out["seq_lens"][0] == 20


@pytest.fixture
def rejection():
    """vLLM's own rejection_sample of the V2 runner."""
    path = "v1/worker/gpu/spec_decode/rejection_sampler_utils.py"
    source("vllm", path)
    return gpu_peers.load("vllm", path).rejection_sample


def batch(requests, drafted, vocab, temperature):
    """What the V2 runner passes, request r in the engine's row 2 r."""
    width, rows = drafted + 1, torch.arange(requests) * 2
    temp = torch.zeros(2 * requests)
    temp[rows] = temperature
    logits = 2 * torch.randn(width, vocab).repeat(requests, 1, 1)
    block = torch.randint(0, vocab, (requests, width), dtype=torch.int32)
    start = torch.arange(requests) * 5 + 3
    return {"target_logits": logits.flatten(0, 1), "draft_logits": None, "draft_sampled": block.flatten(),
            "cu_num_logits": torch.arange(requests + 1, dtype=torch.int32) * width,
            "pos": (start[:, None] + torch.arange(width)).flatten(), "idx_mapping": rows,
            "expanded_idx_mapping": rows.repeat_interleave(width),
            "expanded_local_pos": torch.arange(width, dtype=torch.int32).repeat(requests), "temperature": temp,
            "seed": torch.full((2 * requests,), 7),  # positions alone tell their numbers apart
            "num_speculative_steps": drafted}


@pytest.fixture
def dflash(monkeypatch):
    """Whoever calls has a sampler for DFlash; tests/engines/test_engines_faults.py asks who does."""
    monkeypatch.setattr(verify_v2, "of_dflash", lambda temperature: True)


def test_vllm_v2_greedy(rejection, dflash):
    given = batch(4, 3, 33, torch.zeros(4))
    target = given["target_logits"].argmax(-1).view(4, 4)
    block = given["draft_sampled"].view(4, 4)
    for b, n in enumerate((0, 1, 3)):
        block[b, 1:n + 1] = target[b, :n]
        block[b, n + 1:] = (target[b, n:-1] + 1) % 33
    block[3, 1:] = -1  # drafts that a grammar refused
    tokens, counts = rejection(**given)
    ours, found = verify_v2.rejection_sample(**given)
    assert found.tolist() == counts.tolist() == [1, 2, 4, 1] and found.dtype == counts.dtype
    assert ours.dtype == tokens.dtype and ours.shape == tokens.shape
    for b, n in enumerate(counts.tolist()):
        assert ours[b, :n].tolist() == tokens[b, :n].tolist()


@pytest.mark.parametrize("block_rule", [False, True])
def test_vllm_v2_sampled(dflash, block_rule):
    """Chi-square of the first token against the distribution; a greedy request among the sampled ones stays greedy."""
    draws, vocab = 20_000, 9
    temperature = torch.ones(draws)
    temperature[0] = 0
    given = batch(draws, 2, vocab, temperature)
    distribution = given["target_logits"][0].double().softmax(-1)
    tokens, counts = verify_v2.rejection_sample(**given, use_block_verification=block_rule)
    assert tokens[0, 0] == distribution.argmax() and counts.min() >= 1
    observed = torch.bincount(tokens[1:, 0], minlength=vocab).double()
    expected = distribution * (draws - 1)
    chi = ((observed - expected) ** 2 / expected).sum()
    assert chi < 37.3, chi  # 8 degrees of freedom: 1e-5
    second = tokens[(counts > 1) & (torch.arange(draws) > 0), 1]  # given that the first was accepted
    expected = given["target_logits"][1].double().softmax(-1) * len(second)
    assert ((torch.bincount(second, minlength=vocab) - expected) ** 2 / expected).sum() < 37.3


@pytest.mark.parametrize("change", [{"draft_logits": 1}, {"synthetic_conditional_rates": 1}, {"contexts": 1},
                                    {"fly_window_size": 4}, {"cu_num_logits": torch.tensor([0, 3, 8])},
                                    {"draft_sampled": torch.zeros(2, 4).int()}, {"idx_mapping": torch.zeros(3).int()},
                                    {"pos": torch.zeros(8)}, {"seed": torch.zeros(4, 1).long()}])
def test_vllm_v2_leaves_to_the_original(dflash, change):
    given = batch(2, 3, 33, torch.zeros(2)) | change
    if "cu_num_logits" in change:
        given["target_logits"] = given["target_logits"][:7]
    assert verify_v2.rejection_sample(**given) is LEFT
