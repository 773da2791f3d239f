"""A fault in each step of vLLM's attention backend for the drafter. Its pages are its own, so that the engine's cannot
go on with them: plain torch does, and gives the same; the log says so once, and the step is off from then on.
"""


import pytest
import torch

from tests.support import attention_parts as attention
from tests.support import fake_vllm as fake

LENS = [7, 0]


@pytest.fixture
def backend(monkeypatch):
    fake.install(monkeypatch)
    return attention.fresh_backend(monkeypatch)


def broken(monkeypatch, owner, name, spoil=lambda *args, **kwargs: None):
    """It raises, after what it writes is garbage; returns its calls."""
    calls = []

    def fault(*args, **kwargs):
        calls.append(args)
        spoil(*args, **kwargs)
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(owner, name, fault)
    return calls


def spoil_output(*args, out, **kwargs):
    out.fill_(77.0)


def spoil_caches(kv, positions, slots, caches, **kwargs):
    for part in (caches[0].k, caches[0].v):
        part[slots // part.shape[1], slots % part.shape[1]] = 77.0


def passes(backend, common, sizes, causal, after_writing=lambda: None):
    """Context is written and the drafter passes, twice; the answers are right each time. sizes: queries of each
    request."""
    torch.manual_seed(3)
    layer = attention.layer_of(backend, True)
    table, context = common.block_table_tensor, torch.randn(7, 2, fake.KV_HEADS, fake.HEAD_DIM)
    slots = table[0, torch.arange(7) // fake.PAGE].long() * fake.PAGE + torch.arange(7) % fake.PAGE
    for _ in range(2):
        layer.impl.do_kv_cache_update(layer, *context.unbind(1), layer.kv_cache, slots)
    after_writing()
    q, k, v = (torch.randn(8, heads, fake.HEAD_DIM) for heads in (attention.HEADS, fake.KV_HEADS, fake.KV_HEADS))
    for _ in range(2):
        made = backend.DFlashMetadataBuilder(None, [], None, None).build(0, common)
        out = layer.impl.forward(layer, q, k, v, layer.kv_cache, made, torch.full_like(q, 9))
        start = 0
        for c, size in zip(LENS, sizes, strict=True):
            rows, start = slice(start, start + size), start + size
            wanted = attention.expected(q[rows], k[rows], v[rows], context[:c], causal)
            torch.testing.assert_close(out[rows], wanted)
        assert (out[start:] == 9).all()


def said(caplog):
    return [r.getMessage().removeprefix("dflash-kernels: ").replace(
        ": failed and is now off in this process", "") for r in caplog.records if r.levelname == "WARNING"]


CAUSAL = pytest.mark.parametrize("causal", [False, True])


@CAUSAL
@pytest.mark.parametrize("spoil", [lambda *args, **kwargs: None, spoil_output], ids=["before the first write", "after"])
def test_a_fault_in_attention(backend, monkeypatch, caplog, causal, spoil):
    calls = broken(monkeypatch, backend, "block_attention", spoil)
    passes(backend, attention.common(LENS, causal=causal), [3, 3], causal)
    assert len(calls) == 1 and said(caplog) == ["attention. RuntimeError: block_attention is broken"]


@pytest.mark.parametrize("spoil", [lambda *args, **kwargs: None, spoil_caches], ids=["before the first write", "after"])
def test_a_fault_in_writing_its_context(backend, monkeypatch, caplog, spoil):
    calls = broken(monkeypatch, backend, "write_context_kv", spoil)
    passes(backend, attention.common(LENS), [3, 3], False)
    assert len(calls) == 1
    assert said(caplog) == ["attention's writes of context K/V. RuntimeError: write_context_kv is broken"]


@pytest.mark.parametrize("where", ["its own", "context_kv's"])
def test_a_fault_in_finding_its_pages(backend, monkeypatch, caplog, where):
    """For the writes of the context, then for the pass: each has its own way back, which asks nobody for the pages."""
    name = "paged"
    calls = broken(monkeypatch, backend.DFlashAttention if where == "its own" else backend, name)
    passes(backend, attention.common(LENS), [3, 3], False)
    assert len(calls) == 2
    assert said(caplog) == [f"attention's writes of context K/V. RuntimeError: {name} is broken",
                            f"attention. RuntimeError: {name} is broken"]


def test_a_fault_in_finding_its_pages_after_the_first_write(backend, monkeypatch, caplog):
    passes(backend, attention.common(LENS), [3, 3], False,
           lambda: broken(monkeypatch, backend.DFlashAttention, "paged"))
    assert said(caplog) == ["attention. RuntimeError: paged is broken"]


@CAUSAL
def test_a_fault_in_building_its_metadata(backend, caplog, causal):
    """One warning, though the passes then go the plain way too."""
    common, calls = attention.common(LENS, causal=causal), []
    common.batch_size = lambda: calls.append(0) or 1 / 0
    passes(backend, common, [3, 3], causal)
    assert len(calls) == 1 and said(caplog) == ["attention's metadata. ZeroDivisionError: division by zero"]


@CAUSAL
def test_requests_with_other_numbers_of_queries_are_answered(backend, caplog, causal):
    """No drafter's pass is so; if one were, it would be slow and right."""
    passes(backend, attention.common(LENS, tokens=5, causal=causal), [3, 2], causal)
    assert said(caplog) == ["attention. NotImplementedError: DFLASH: every request must have as many queries, as in a "
                            "drafter's pass"]


def test_quantised_outputs_are_refused_before_anything_is_served(backend):
    """The engine is told when it compiles, and its first pass, which measures memory, would raise."""
    layer = attention.layer_of(backend, True)
    assert layer.impl.fused_output_quant_supported("fp8") is False
    q, kv = torch.zeros(6, attention.HEADS, fake.HEAD_DIM), torch.zeros(6, fake.KV_HEADS, fake.HEAD_DIM)
    for scales in ((torch.ones(1),), (None, torch.ones(1))):
        with pytest.raises(NotImplementedError, match="quantised outputs"):
            layer.impl.forward(layer, q, kv, kv, layer.kv_cache, None, q.clone(), *scales)
