"""DFlash2's ops and hooks against the engines' own functions and kernels, taken from their wheels and run in Triton's
interpreter."""

import sys
import types

import pytest
import torch
from torch import nn

from bench.peers import gpu_peers
from dflash_engines.hooks import Choice, install
from dflash_engines.vllm import LOG, conv, selector
from dflash_kernels import PagedKV, reference
from dflash_kernels._triton import context as our_context
from dflash_kernels._triton import conv as our_conv
from dflash_kernels._triton.selector import select_candidates
from dflash_kernels.testing import assert_within_budget, doubles, same_bits
from tests.support import fake_dflash2 as fake
from tests.support import sglang_parts
from tests.support.engine_files import source

MODEL, SPECULATOR = "model_executor/models/qwen3_dflash2.py", "v1/worker/gpu/spec_decode/dflash2/speculator.py"
GREEDY = (None,) * 5


def load(path):
    source("vllm", path)
    return gpu_peers.load("vllm", path)


def convolution(rows=12, dtype=torch.float32, hidden=96, groups=6, taps=2):
    both = torch.randn(rows, 2, taps, groups).to(dtype)
    return torch.randn(rows, hidden).to(dtype), both[:, 1], torch.randn(taps, hidden).to(dtype)


# Their kernels beside ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block, taps", [(1, 2), (3, 2), (4, 3)])
def test_convolution_of_vllm(dtype, block, taps):
    given = convolution(dtype=dtype, taps=taps)
    theirs, ours = load(MODEL).dflash2_grouped_conv_impl(*given, block, 16), torch.empty_like(given[0])
    our_conv.grouped_conv(*given, block, 0, ours)
    exact = torch.empty_like(given[0], dtype=torch.float64)
    reference.conv.grouped_conv(*doubles(*given), block, 0, exact)
    for found, peer in ((theirs, ours), (ours, theirs)):  # both sum in float32 and round once, in orders of their own
        assert_within_budget(found, exact, peer)
    other = torch.empty_like(exact)
    reference.conv.grouped_conv(*doubles(*given), 6, 0, other)
    assert not torch.allclose(theirs.double(), other, atol=0.1)  # another boundary


@pytest.mark.parametrize("block", [3, 4])
def test_torch_forms_of_both_engines_round_as_engine(monkeypatch, block):
    """Where they are not compiled: vLLM without a GPU, SGLang on one of another kind."""
    given, found = convolution(dtype=torch.float16), torch.empty(12, 96, dtype=torch.float16)
    our_conv.grouped_conv(*given, block, 2, found)
    sglang_parts.install(monkeypatch)
    for form in (load(MODEL)._grouped_conv, sys.modules[sglang_parts.MODELS]._grouped_conv):
        assert torch.equal(form(*given, block, 6, 16, 2), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convolution_addition_and_norm_of_beam(dtype):
    given, residual, weight = convolution(dtype=dtype), torch.randn(12, 96).to(dtype), torch.randn(96).to(dtype)
    kept, out = residual.clone(), torch.empty_like(residual)
    theirs, sums = load("models/beam/nvidia/dflash2_conv_ops.py").conv_residual_norm(
        *given, residual.clone(), weight, 1e-5, 4, 16)
    our_conv.grouped_conv_add_rms_norm(*given, 4, 0, kept, weight, 1e-5, out, None)
    torch.testing.assert_close(kept, sums)
    torch.testing.assert_close(out, theirs)


def walk_of(problem):
    ids, values, hidden, anchors, predecessor, successor = problem
    tokens = torch.empty(ids.shape[:2], dtype=torch.int64)
    select_candidates(values, ids, hidden, anchors, predecessor, successor, torch.zeros(len(ids), dtype=torch.int32),
                      *GREEDY, tokens, torch.empty(ids.shape[:2]), None)
    return tokens


def selection(k=16, dtype=torch.float16, requests=3, drafted=4):
    ids, values, _ = fake.candidates(requests, drafted, k=k)
    tables = (torch.randint(-1, 2, (fake.VOCAB, 96)).to(dtype) for _ in range(2))  # so that sums are exact
    return (ids, values, torch.randint(-1, 2, (requests, drafted, 96)).to(dtype), torch.arange(requests) * 7, *tables)


@pytest.mark.parametrize("k", [16, 5])
def test_scores_and_walk_of_vllm(k):
    ids, values, hidden, anchors, *tables = problem = selection(k)
    drafts, count = walk_of(problem), ids.shape[0] * ids.shape[1]
    every = reference.selector.edges(values, ids, hidden, anchors, *tables)
    edges = load("models/beam/nvidia/dflash2_ops.py").candidate_edges(*tables, ids, values, hidden, anchors, k)
    assert same_bits(edges, every)
    assert same_bits(load(MODEL)._score_edges(*tables, ids, values, hidden, anchors, k).float(), every)
    sampler, found = load(SPECULATOR).CandidateSampler(3, 4, k, torch.device("cpu")), torch.zeros(3, 4).long()
    rows = torch.arange(3).repeat_interleave(4)
    sampler.sample(ids, edges, 3, torch.arange(count), rows, torch.zeros(3), torch.zeros(3).long(), found, None, False)
    assert torch.equal(drafts, found) and not torch.equal(found, ids[..., 0])
    edges[:, 1:] = edges[:, 1:].roll(1, 2)  # each candidate takes its neighbour's row
    sampler.sample(ids, edges, 3, torch.arange(count), rows, torch.zeros(3), torch.zeros(3).long(), found, None, False)
    assert not torch.equal(drafts, found)


def test_walk_of_sglang(monkeypatch):
    """Greedy, with ties and a NaN; the walk takes K that are powers of two."""
    sglang_parts.install(monkeypatch)
    ids, values, hidden, anchors, *tables = selection(8)
    values[0, 0, 3] = values[0, 2, 5] = float("nan")
    values[1], hidden[1] = 0.0, 0.0  # all equal
    every = reference.selector.edges(values, ids, hidden, anchors, *tables)
    walk = sys.modules[sglang_parts.WALK].selector_walk_triton
    given = {"candidate_ids": ids, "scores": every, "uniforms": torch.rand(3, 4), "temperatures": torch.ones(3)}
    found, q = walk(**given, greedy_mask=torch.ones(3, dtype=torch.bool))
    assert torch.equal(walk_of((ids, values, hidden, anchors, *tables)), found)
    assert found[0, 0] == ids[0, 0, 3] and torch.equal(found[1], ids[1, :, 0])
    assert torch.equal(q, (ids == found[..., None]).float())


@pytest.mark.parametrize("fp8", [False, True])
def test_context_kv_of_beam(fp8):
    """All layers in one launch, as ours; an fp8 cache with each layer's scales."""
    layers, heads, dim, page, pages, tokens = 3, 2, 64, 4, 6, 5
    kv, weight = torch.randn(tokens, layers, 2, heads, dim).half(), torch.randn(layers, dim).half()
    table, slots = torch.randn(32, dim).half(), torch.tensor([9, 3, -1, 22, 1])
    scales = torch.tensor([[0.5, 0.02], [0.03, 2.0], [1.0, 0.25]])
    stored = [[torch.zeros(pages, heads, page, 2 * dim, dtype=torch.float8_e4m3fn if fp8 else torch.half)
               for _ in range(layers)] for _ in range(2)]
    pointers = torch.tensor([cache.data_ptr() for cache in stored[0]])
    load("models/beam/nvidia/dflash2_context_ops.py").store_context_kv(
        kv, weight, torch.arange(tokens) + 7, table, pointers, slots, stored[0][0], 1e-6,
        torch.tensor([s.data_ptr() for pair in scales for s in pair]) if fp8 else None)
    caches = [PagedKV(*cache.transpose(1, 2).split(dim, -1)) for cache in stored[1]]
    k_scales, v_scales = ([*scales[:, i]] if fp8 else [] for i in (0, 1))
    our_context.write_context_kv(kv.flatten(1), torch.arange(tokens) + 7, slots, [c.k for c in caches],
                                 [c.v for c in caches], k_scales, v_scales, weight, table, None, 1e-6, 1.0, False, True)
    for theirs, ours in zip(*stored, strict=True):
        assert theirs.view(torch.uint8).any()
        if fp8:  # theirs by the interpreter's conversion, which drops a carry out of the mantissa
            assert (theirs.view(torch.uint8) != ours.view(torch.uint8)).float().mean() < 0.01
        else:
            torch.testing.assert_close(ours, theirs)


def test_fp8_caches_of_vllms_own_writes(monkeypatch):
    """One launch for all layers has the bytes of its write for each. Numbers that fp8 has, times powers of two."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (9, 0))
    write = load("v1/attention/ops/triton_reshape_and_cache_flash.py").triton_reshape_and_cache_flash
    layers, heads, dim, page, pages, tokens = 3, 2, 64, 4, 6, 5
    scales, slots = torch.tensor([[0.5, 4.0], [2.0, 0.25], [1.0, 8.0]]), torch.tensor([9, 3, -1, 22, 1])
    numbers = torch.randn(tokens, layers, 2, heads, dim).to(torch.float8_e4m3fn).half()
    kv = numbers * scales.half()[:, :, None, None]
    theirs = [torch.zeros(2, pages, page, heads, dim, dtype=torch.uint8) for _ in range(layers)]
    ours = [torch.zeros(2, pages, page, heads, dim, dtype=torch.float8_e4m3fn) for _ in range(layers)]
    for i, (cache, pair) in enumerate(zip(theirs, scales, strict=True)):
        write(kv[:, i, 0].contiguous(), kv[:, i, 1].contiguous(), *cache, slots, "fp8", *pair)
    our_context.write_context_kv(kv.flatten(1), torch.arange(tokens), slots, [c[0] for c in ours], [c[1] for c in ours],
                                 [*scales[:, 0]], [*scales[:, 1]], None, None, None, 1e-6, 1.0, False, True)
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert torch.equal(a, b.view(torch.uint8)), i
        assert torch.equal(b[0].flatten(0, 1)[9].half(), numbers[0, i, 0])


# The hooks on their functions


@pytest.fixture
def vllm(monkeypatch):
    """vLLM 0.33.0's modules of DFlash2 under their names, and the hooks installed by the real digests."""
    models, spec = load(MODEL), load(SPECULATOR)
    platform = types.ModuleType("vllm.platforms")
    platform.current_platform = types.SimpleNamespace(dispatch_key="CPU")
    for module in (models, spec, platform):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(conv, "LIBRARIES", [])
    for owner, name in ((models, "dflash2_grouped_conv_impl"), (spec.DFlash2Speculator, "_score_candidates"),
                        (spec.CandidateSampler, "sample")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # restored afterwards

    def on():
        choice = Choice("DFLASH_VLLM", frozenset(), frozenset({"grouped_conv", "selector"}))
        assert [o.why for o in install([conv.HOOK, selector.HOOK], "0.33.0", "sm_90", choice, LOG)] == ["", ""]

    return types.SimpleNamespace(models=models, spec=spec, on=on)


def speculator(vllm, requests=3, drafted=4, k=5, dtype=torch.float16):
    """The engine's class, by what its own _generate_draft reads."""
    made, width = vllm.spec.DFlash2Speculator.__new__(vllm.spec.DFlash2Speculator), drafted + 1
    chooser = vllm.models.CandidateSelector(fake.HIDDEN, fake.VOCAB, fake.RANK, k, dtype, "")
    chooser.load_state_dict({n: torch.randn(fake.VOCAB, fake.RANK).to(dtype) for n in chooser.state_dict()})
    chooser.hidden_projection = nn.Linear(fake.HIDDEN, fake.RANK, bias=False, dtype=dtype)
    ids, values, _ = fake.candidates(requests, drafted, k=k)
    inner = types.SimpleNamespace(candidate_selector=chooser)
    made.model = types.SimpleNamespace(model=inner, compute_candidates=lambda states: (ids.flatten(0, 1),
                                                                                       values.flatten(0, 1)))
    made.sample_indices = torch.arange(requests * width).view(-1, width)[:, 1:].flatten()
    states = torch.randn(requests * width, fake.HIDDEN).to(dtype)
    made._run_model = lambda *args: states
    made.num_speculative_steps, made.num_query_per_req, made.top_k = drafted, width, k
    made.input_buffers = types.SimpleNamespace(
        input_ids=torch.randint(fake.VOCAB, (requests * width,), dtype=torch.int32))
    made.candidate_sampler = vllm.spec.CandidateSampler(requests, drafted, k, torch.device("cpu"))
    made.sample_pos, made.sample_idx_mapping = torch.arange(32), torch.arange(requests).repeat_interleave(drafted)
    made.temperature, made.seeds = torch.zeros(requests), torch.zeros(requests, dtype=torch.int64)
    made.draft_tokens, made.draft_logits = torch.full((requests, drafted), -1), None
    made.use_fp64_gumbel, made.enable_adaptive_verification = False, False
    return made


def test_vllm_drafts_the_same_with_the_hook(vllm, monkeypatch):
    made = speculator(vllm)
    with torch.inference_mode():
        made._generate_draft(3, 15, None, None, None)
        expected = made.draft_tokens.clone()
        vllm.on()
        made.draft_tokens.fill_(-1)
        monkeypatch.setattr(vllm.models, "_score_edges", None)  # nobody asks for all edges
        made._generate_draft(3, 15, None, None, None)
    assert torch.equal(made.draft_tokens, expected) and made._dflash_selector[0] is not None


def test_vllm_samples_by_itself(vllm, monkeypatch):
    """With a temperature its verification reads the scores that the walk leaves."""
    made = speculator(vllm)
    made.draft_logits = torch.full((3, 4, fake.VOCAB), -torch.inf)
    vllm.on()
    with torch.inference_mode():
        made._generate_draft(3, 15, None, None, None)
    assert made._dflash_selector[0] is None and (made.draft_logits > -torch.inf).sum() == 3 * 4 * 5


def test_vllms_operator_is_ours(vllm, monkeypatch):
    given = convolution(dtype=torch.float16)
    expected = vllm.models.dflash2_grouped_conv_impl(*given, 4, 16)
    vllm.on()
    monkeypatch.setattr(vllm.models, "_dflash2_grouped_conv_kernel", None)
    with torch.inference_mode():
        found = vllm.models.dflash2_grouped_conv(*given, 4, 16)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def sglang(monkeypatch):
    return sglang_parts.install(monkeypatch)


def test_sglangs_convolution_with_the_hook(sglang, monkeypatch):
    cls, (x, _, base) = sys.modules[sglang_parts.MODELS].DFlashGroupedConv, convolution()
    made = cls(96, 4, 2, 16)
    made.base_kernel, made.kernel_projection = (nn.Parameter(torch.stack([base, base.flip(0)]), requires_grad=False),
                                                nn.Linear(96, 24, bias=False).requires_grad_(False))
    sglang_parts.loaded(sglang)
    hooked, coefficients = made.prepare(x)
    both = hooked, made.finish(x, coefficients)
    monkeypatch.setattr(cls, "_convolve", cls._convolve.__wrapped__)
    expected, coefficients = made.prepare(x)
    for found, theirs in zip(both, (expected, made.finish(x, coefficients)), strict=True):
        torch.testing.assert_close(found, theirs)
    made.block_size = 5
    assert not torch.allclose(made.finish(x, coefficients), both[1])


def test_sglang_drafts_the_same_with_the_hook(sglang, monkeypatch):
    """Through the sampler of the captured draft graph: greedy requests, and a sampled one among them."""
    worker, (ids, values, _) = sglang[0], fake.candidates(3, 4, k=8)
    cls = sys.modules[sglang_parts.MODELS].CandidateSelector
    chooser = cls(hidden_size=fake.HIDDEN, vocab_size=fake.VOCAB, state_rank=fake.RANK, top_k=8).requires_grad_(False)
    for table in (chooser.predecessor_codebook, chooser.successor_codebook):
        table.normal_()
    model = types.SimpleNamespace(candidate_selector=chooser, compute_candidates=lambda states: (
        ids.flatten(0, 1), values.flatten(0, 1)))
    made = worker._SelectorDraftSampler(draft_model=model, block_size=5, max_bs=3, device=torch.device("cpu"),
                                        sampling_enabled=True)
    states, block = torch.randn(15, fake.HIDDEN), torch.randint(fake.VOCAB, (15,))
    made(states, block)
    expected, q = made.out.view(3, 4).clone(), made.q_out.clone()
    sglang_parts.loaded(sglang)
    made.out.fill_(-1)
    monkeypatch.setattr(sys.modules[sglang_parts.MODELS], "_score_edges", None)
    made(states, block)
    assert torch.equal(made.out.view(3, 4), expected) and torch.equal(made.q_out, q)
    made.greedy_mask[1], made.temperatures[1] = False, 1.5
    made(states, block)
    assert torch.equal(made.out.view(3, 4)[::2], expected[::2]) and torch.equal(made.candidate_out, ids)
    assert ((made.q_out[1] > 0) & (made.q_out[1] < 1)).any() and torch.allclose(made.q_out.sum(-1), torch.ones(3, 4))
