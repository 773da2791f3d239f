"""The hooks for DFlash2 on stand-ins for both engines. On the engines' own functions: test_triton_dflash2.py."""

import dataclasses
import logging
import sys
import types

import pytest
import torch

from dflash_engines import dflash2, hooks, sources
from dflash_engines import sglang as sglang_plugin
from dflash_engines import vllm as vllm_plugin
from dflash_engines.sglang import selector as sglang_selector
from dflash_engines.vllm import conv
from dflash_engines.vllm import selector as vllm_selector
from tests.support import fake_dflash2 as fake
from tests.support import fake_vllm

LOG = logging.getLogger("tests.engines")
WIDTH = 4  # of a block: the anchor and three drafts


class Vllm:
    ours = vllm_selector

    def __init__(self, monkeypatch, off="", **changes):
        fake_vllm.install(monkeypatch)
        monkeypatch.setenv("DFLASH_VLLM_ENABLE", "grouped_conv,selector")
        monkeypatch.setenv("DFLASH_VLLM_DISABLE", off)
        vllm_plugin.register()
        self.owner = fake_vllm.make(sys.modules["vllm.v1.worker.gpu.spec_decode.dflash2.speculator"].DFlash2Speculator)
        self.selector = sys.modules["vllm.model_executor.models.qwen3_dflash2"].CandidateSelector(**changes)
        self.owner.load(self.selector, width=WIDTH)
        self.anchors = self.owner.input_buffers.input_ids[::WIDTH]

    def conv(self, x, delta, base, block):
        return torch.ops.vllm.dflash2_grouped_conv(x, delta, base, block, fake.GROUP)

    def draft(self, ids, values, states):
        self.owner._generate_draft(ids, values, states)
        return self.owner.draft_tokens[:len(ids)].clone()


class Sglang:
    ours = sglang_selector

    def __init__(self, monkeypatch, off="", **changes):
        for name, names in fake.sglang_modules().items():
            module = types.ModuleType(name)
            module.__dict__.update(names)
            monkeypatch.setitem(sys.modules, name, module)
        known = [hook for hook in sglang_plugin.hooks() if hook.name in ("grouped_conv", "selector")]
        known = [dataclasses.replace(hook, read={"0.5.23": digest(hook)}) for hook in known]
        choice = hooks.Choice("DFLASH_SGLANG", frozenset({off}), frozenset({"grouped_conv", "selector"}))
        hooks.install(known, "0.5.23", "cpu", choice, LOG)
        models = sys.modules["sglang.srt.models.dflash"]
        self.layer, self.selector = models.DFlashGroupedConv(WIDTH), models.CandidateSelector(**changes)
        self.owner, self.anchors = self.selector, torch.arange(4) * WIDTH

    def conv(self, x, delta, base, block):
        self.layer.base_kernel, self.layer.block_size = torch.stack([torch.zeros_like(base), base]), block
        return self.layer._convolve(x, delta, 1)

    def draft(self, ids, values, states):
        return self.walk(ids, values, states, torch.ones(len(ids)), torch.ones(len(ids), dtype=torch.bool))[0]

    def walk(self, ids, values, states, temperatures, greedy):
        scores = self.selector.build_lattice(candidate_ids=ids, unary_logits=values, hidden_states=states,
                                             anchor_token_ids=self.anchors[:1].expand(len(ids)))
        return self.selector.sample_path(candidate_ids=ids, scores=scores, uniforms=torch.rand(ids.shape[:2]),
                                         temperatures=temperatures, greedy_mask=greedy)


def digest(hook):
    return sources.digest(sources.of_function(sources.resolve(s)[2]) for s in hook.sources)


@pytest.fixture(params=[Vllm, Sglang], ids=["vllm", "sglang"])
def engine(request, monkeypatch):
    fake.CALLS.clear()
    return lambda **changes: request.param(monkeypatch, **changes)


def rows(count, dtype=torch.float32):
    """x, both halves of a projection's coefficients, base."""
    both = torch.randn(count, 2, fake.TAPS, fake.HIDDEN // fake.GROUP).to(dtype)
    return torch.randn(count, fake.HIDDEN).to(dtype), both[:, 1], torch.randn(fake.TAPS, fake.HIDDEN).to(dtype)


def drafted_by_loops(made, ids, values, states):
    """By the stand-ins' own scores of all edges. SGLang's requests share an anchor here."""
    anchors = made.anchors[:len(ids)] if isinstance(made, Vllm) else made.anchors[:1].expand(len(ids))
    return fake.walked(ids, made.selector.scores(ids, values, states, anchors), fake.greedy)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 3, 4])
def test_the_convolution_is_the_engines(engine, dtype, block):
    made, (x, delta, base) = engine(), rows(12, dtype)
    found, expected = made.conv(x, delta, base, block), fake.convolved(x, delta, base, block, fake.GROUP)
    torch.testing.assert_close(found, expected)  # float32 sums: the neighbouring number where they are between two
    assert fake.CALLS == [] and found.dtype == dtype
    assert not torch.allclose(found, fake.convolved(x, delta, base, 6, fake.GROUP))  # another block boundary
    wide = torch.randn(12, 2 * fake.HIDDEN).to(dtype)
    wide[:, :fake.HIDDEN] = x
    assert torch.equal(made.conv(wide[:, :fake.HIDDEN], delta, base, block), found)


@pytest.mark.parametrize("change", [
    lambda x, delta, base: (x[:11], delta[:11], base),  # padded to no whole number of blocks
    lambda x, delta, base: (x[:0], delta[:0], base), lambda x, delta, base: (x.double(), delta, base),
    lambda x, delta, base: (x.double(), delta.double(), base.double()),
    lambda x, delta, base: (x.t().contiguous().t(), delta, base)])
def test_the_convolution_leaves_what_it_was_not_written_for(engine, change, caplog):
    """And does not fail, which would turn it off."""
    made, given = engine(), change(*rows(12))
    assert torch.equal(made.conv(*given, 4), fake.convolved(*given, 4, fake.GROUP)) and fake.CALLS == ["conv"]
    assert not caplog.records


def test_a_fault_in_the_convolution(engine, monkeypatch, caplog):
    made, given, calls = engine(), rows(12), []

    def broken(*args):
        calls.append(args)
        raise RuntimeError("grouped_conv is broken")

    monkeypatch.setattr(dflash2, "grouped_conv", broken)
    for _ in range(2):
        assert torch.equal(made.conv(*given, 4), fake.convolved(*given, 4, fake.GROUP))
    assert len(calls) == 1 and fake.CALLS == ["conv"] * 2
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "dflash-kernels: grouped_conv: failed and is now off in this process. RuntimeError: grouped_conv is broken"]


@pytest.mark.parametrize("dtype, k", [(torch.float32, fake.K), (torch.bfloat16, 16), (torch.float16, 1)])
def test_the_selector_drafts_what_the_engine_drafts(engine, dtype, k):
    made = engine(dtype=dtype, k=k)
    for requests in (4, 2):
        given = fake.candidates(requests, dtype=dtype, k=k)
        expected = drafted_by_loops(made, *given)
        assert torch.equal(made.draft(*given), expected) and fake.CALLS == []
        assert k == 1 or not torch.equal(expected, given[0][..., 0])
    other = made.selector.scores(*given, torch.zeros(2, dtype=torch.int64))
    other[:, 1:] = other[:, :1]  # had every position the anchor before it
    assert k == 1 or not torch.equal(fake.walked(given[0], other, fake.greedy)[0], expected)


@pytest.mark.parametrize("where", ["the scores", "the walk"])
def test_a_fault_in_the_selector(engine, monkeypatch, caplog, where):
    """The engine's scores, put off or not, and its walk."""
    made, given, calls = engine(), fake.candidates(3), []
    expected = drafted_by_loops(made, *given)

    def broken(*args, **kwargs):
        calls.append(args)
        raise RuntimeError("the op is broken")

    name = "selectable" if where == "the scores" else "select_candidates"
    monkeypatch.setattr(made.ours, name, broken)
    for _ in range(2):
        assert torch.equal(made.draft(*given), expected)
    assert len(calls) == 1 and fake.CALLS == ["scores", "walk"] * 2
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "dflash-kernels: selector: failed and is now off in this process. RuntimeError: the op is broken"]


@pytest.mark.parametrize("change", [
    lambda ids, values, states: (ids.transpose(1, 2).contiguous().transpose(1, 2), values, states),
    lambda ids, values, states: (ids, values.double(), states)])
def test_the_selector_leaves_what_it_was_not_written_for(engine, change, caplog):
    made, given = engine(), fake.candidates(3)
    assert torch.equal(made.draft(*change(*given)), drafted_by_loops(made, *given))
    assert fake.CALLS == ["scores", "walk"] and not caplog.records


@pytest.mark.parametrize("change, why", [
    ({"k": 60}, ""), ({"dtype": torch.float64}, "a selector of torch.float64")])
def test_which_selectors_are_covered(engine, caplog, change, why):
    with caplog.at_level(logging.INFO):
        made = engine(**change)
        made.draft(*fake.candidates(2, dtype=change.get("dtype", torch.float32), k=change.get("k", fake.K)))
    expected = ["scores", "walk"] if why else []
    assert expected == fake.CALLS
    assert f"selector: {f'not active for this model, {why}' if why else 'active for this model'}" in caplog.text


def test_more_candidates_than_the_op_takes_and_codebooks_of_two_dtypes():
    selector = fake.CandidateSelector(k=65)
    assert dflash2.uncovered(selector) == "select_candidates: k must be between 1 and 64; got 65"
    selector.top_k, selector.successor_codebook = 5, torch.nn.Parameter(selector.successor_codebook.half())
    assert dflash2.uncovered(selector) == "a selector of torch.float16, torch.float32"
    selector.successor_codebook = torch.nn.Parameter(torch.zeros(fake.RANK, fake.VOCAB).t())
    assert dflash2.uncovered(selector) == "codebooks that are not contiguous"


@pytest.mark.parametrize("change, why", [
    ({"draft_logits": torch.zeros(1)}, "drafts that are sampled, whose scores the engine keeps"),
    ({"enable_adaptive_verification": True}, "adaptive verification, which reads the scores")])
def test_vllm_keeps_what_reads_all_scores(monkeypatch, caplog, change, why):
    fake.CALLS.clear()
    made, given = Vllm(monkeypatch), fake.candidates(3)
    vars(made.owner).update(change)
    with caplog.at_level(logging.INFO):
        assert torch.equal(made.draft(*given), drafted_by_loops(made, *given))
    assert fake.CALLS == ["scores", "walk"] and f"not active for this model, {why}" in caplog.text


def test_vllm_keeps_a_selector_of_another_class(monkeypatch, caplog):
    """LiLiCorr's, Beam's: their speculators derive from DFlash2's."""
    fake.CALLS.clear()
    made, given = Vllm(monkeypatch), fake.candidates(3)
    made.selector.__class__ = type("DFlash2BeamCandidateSelector", (fake.VllmSelector,), {})
    with caplog.at_level(logging.INFO):
        made.draft(*given)
    assert fake.CALLS == ["scores", "walk"] and "a selector of DFlash2BeamCandidateSelector" in caplog.text


def test_vllm_installs_them_for_dflash2_alone(monkeypatch, caplog):
    model, proposer, sampler = fake_vllm.install(monkeypatch)
    monkeypatch.setenv("DFLASH_VLLM_ENABLE", "grouped_conv,selector")
    vllm_plugin.register()
    path = "vllm.v1.worker.gpu.spec_decode"
    with caplog.at_level(logging.INFO):
        fake_vllm.make(sys.modules[f"{path}.dflash.speculator"].DFlashSpeculator)
    assert "selector" not in caplog.text and "grouped_conv" not in caplog.text
    module = sys.modules[f"{path}.dflash2.speculator"]
    before = module.CandidateSampler.sample
    with caplog.at_level(logging.INFO):
        fake_vllm.make(module.DFlash2Speculator)
    assert "selector: replaced" in caplog.text and "grouped_conv: replaced" in caplog.text
    first = module.CandidateSampler.sample
    fake_vllm.make(module.DFlash2Speculator)
    assert before is not first is module.CandidateSampler.sample and len(conv.LIBRARIES) == 1  # twice is once


@pytest.mark.parametrize("off", ["selector", "grouped_conv"])
def test_each_is_turned_off_by_name(engine, off):
    made = engine(off=off)
    made.draft(*fake.candidates(2))
    made.conv(*rows(12), 4)
    expected = ["scores", "walk"] if off == "selector" else ["conv"]
    assert expected == fake.CALLS


def test_sglangs_sampled_requests_follow_its_distribution(monkeypatch):
    """q is the softmax of the scores behind what was drafted, and drafts are drawn from it; greedy ones are not."""
    fake.CALLS.clear()
    made, draws = Sglang(monkeypatch), 4000
    ids, values, states = (t.expand(draws, *t.shape[1:]).contiguous() for t in fake.candidates(1))
    greedy, temperatures = torch.arange(draws) % 4 == 0, torch.where(torch.arange(draws) % 2 > 0, 0.7, 2.0)
    tokens, q = made.walk(ids, values, states, temperatures, greedy)
    assert fake.CALLS == [] and tokens.shape == (draws, 3) and q.shape == ids.shape
    scores = made.selector.scores(ids[:1], values[:1], states[:1], made.anchors[:1])[0]
    assert torch.equal(tokens[greedy], fake.walked(ids[:1], scores[None], fake.greedy)[0].expand_as(tokens[greedy]))
    places = (ids == tokens[..., None]).int().argmax(-1)
    before = torch.cat([torch.zeros_like(places[:, :1]), places[:, :-1]], 1)
    each = torch.stack([scores[i][before[:, i]] for i in range(3)], 1)
    exact = (each / temperatures[:, None, None]).softmax(-1)
    torch.testing.assert_close(q[~greedy], exact[~greedy])
    assert torch.equal(q[greedy], torch.nn.functional.one_hot(places[greedy], fake.K).float())
    for i, temperature in ((0, 0.7), (0, 2.0), (1, 2.0)):
        asked = ~greedy & (temperatures == temperature) & (before[:, i] == before[~greedy, i].mode()[0])
        expected = exact[asked, i].double().sum(0)
        chi = ((torch.bincount(places[asked, i], minlength=fake.K) - expected) ** 2 / expected).sum()
        assert chi < 28.5, chi  # 4 degrees of freedom: 1e-5


def test_sglangs_fault_on_one_of_two_ranks_ends_it(monkeypatch):
    """Its numbers are not the engine's: a rank that went back alone would verify other drafts than the others."""
    made, given = Sglang(monkeypatch), fake.candidates(2)

    def broken(*args, **kwargs):
        raise RuntimeError("the op is broken")

    monkeypatch.setattr(sglang_selector, "select_candidates", broken)
    monkeypatch.setattr(hooks, "_ranks", lambda: 2)
    with pytest.raises(RuntimeError, match="the op is broken"):
        made.draft(*given)
