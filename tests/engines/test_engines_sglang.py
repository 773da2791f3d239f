"""SGLang's plugin: when its hooks are in place, and faults in them. What they compute:
tests/triton/test_triton_engines.py."""

import functools
import sys
import types

import pytest
import torch

from dflash_engines import hooks, watch
from dflash_engines import sglang as plugin
from dflash_engines.hooks import LEFT
from dflash_engines.sglang import head, sampling
from tests.support.sglang_parts import ENABLED, HIDDEN, MODELS, drafts, install, loaded, said


@pytest.fixture
def engine(monkeypatch):
    return install(monkeypatch)


def test_nothing_before_the_worker_and_nothing_unmeasured(engine, monkeypatch, caplog):
    worker, utils, registry = engine
    name, before = worker.__name__, dict(vars(worker))
    monkeypatch.delenv("DFLASH_SGLANG_ENABLE")
    monkeypatch.delitem(sys.modules, name)
    plugin.register()
    assert not registry._hooks and name not in sys.modules
    watch._FINDER.waiting.pop(name)
    monkeypatch.setitem(sys.modules, name, worker)
    with caplog.at_level("INFO"):
        plugin.register()
    assert not registry._hooks and vars(worker) == before
    assert f"not measured on cpu yet: {', '.join(ENABLED)}; enable with DFLASH_SGLANG" in caplog.text


def test_the_registry_calls_us(engine):
    worker, utils, registry = engine
    loaded(engine)
    plugin.register()
    assert said(engine) == {} and len(registry._hooks) == 6  # the selector's are two
    assert all(len(hooks) == 1 for hooks in registry._hooks.values())  # twice is once
    sampler = worker._DflashDraftSampler(weight=torch.randn(50, HIDDEN), block_size=4, num_org=50, org_vocab_start=0,
                                         max_bs=2)
    sampler(torch.randn(8, HIDDEN))
    assert sampler._dflash_draft_head[0] is not None
    # The copy that the worker imported by name is replaced too.
    assert worker.compute_dflash_sampling_correct_drafts_and_bonus is (
        utils.compute_dflash_sampling_correct_drafts_and_bonus)


def test_hooks_of_other_plugins_are_left_to_the_registry(engine):
    """It may be applying them when it imports the worker, and would apply what we had applied a second time."""
    worker, utils, registry = engine
    worker.step, calls = (lambda: "step"), []
    registry.register(f"{worker.__name__}.step", lambda *args, **kwargs: calls.append(1),
                      sys.modules["sglang.srt.plugins.hook_registry"].HookType.BEFORE)
    loaded(engine)
    assert worker.step() == "step" and calls == [] and len(registry._patched) == 6
    registry.apply_hooks()
    assert worker.step() == "step" and calls == [1] and len(registry._patched) == 7


@pytest.mark.parametrize("name", ENABLED)
def test_a_changed_function_leaves_that_hook_alone(engine, monkeypatch, name):
    worker, utils, registry = engine
    owner, attribute = {"context_kv": (worker.DFlashWorkerV2, "_append_target_hidden_fused"),
                        "draft_head": (worker._DflashDraftSampler, "__call__"),
                        "sampling": (utils, "compute_dflash_sampling_correct_drafts_and_bonus"),
                        "grouped_conv": (sys.modules[MODELS].DFlashGroupedConv, "_convolve"),
                        "selector": (sys.modules[MODELS].CandidateSelector, "sample_path")}[name]
    inner = getattr(owner, attribute)

    @functools.wraps(inner)
    def changed(*args, **kwargs):
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, changed)
    outcomes = said(engine)
    assert outcomes.pop(name) == "its source is not that of 0.5.23"
    assert set(outcomes.values()) == {""} and len(registry._hooks) == (4 if name == "selector" else 5)


@pytest.mark.parametrize("version", ["0.5.20", "0.5.21", "0.5.24"])
def test_a_version_that_was_not_read(engine, version):
    sys.modules["sglang.version"].__version__ = version
    assert set(said(engine).values()) == {f"version {version} was not read; 0.5.23 was"} and not engine[2]._hooks


def test_a_hook_is_turned_off_by_name(engine, monkeypatch):
    monkeypatch.setenv("DFLASH_SGLANG_DISABLE", "sampling")
    assert list(said(engine).values()) == ["", "", "disabled by DFLASH_SGLANG_DISABLE", "", ""]
    assert len(engine[2]._hooks) == 5


def test_sampling_leaves_relaxed_thresholds(engine):
    ours = sampling.compute_dflash_sampling_correct_drafts_and_bonus
    assert ours(candidates=None, next_token_logits=None, sampling_info=None, threshold_single=0.9,
                threshold_acc=1.0) is LEFT


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("where", ["lm_head_argmax", "pack_weight"])
def test_a_fault_in_draft_head_parts_no_ranks(engine, monkeypatch, caplog, ranks, where):
    """On the first rank alone: the collectives are the same by either way, so the others get their answers."""
    hidden, weight = torch.randn(12, HIDDEN), torch.randn(60, HIDDEN)
    expected, inner, tried = drafts(engine, 1, hidden, weight)[0], getattr(head, where), []
    loaded(engine)

    def broken(*args, **kwargs):
        tried.append(args)
        if len(tried) == 1:
            raise RuntimeError(f"{where} is broken")
        return inner(*args, **kwargs)

    monkeypatch.setattr(head, where, broken)
    for _ in range(2):
        assert drafts(engine, ranks, hidden, weight) == [expected] * ranks
    assert [r.levelname for r in caplog.records].count("WARNING") == 1 and len(tried) <= ranks


def sampled(engine, requests=3, width=4, vocab=12):
    info = types.SimpleNamespace(temperatures=torch.ones(requests, 1), top_ks=torch.full((requests,), 5),
                                 top_ps=torch.ones(requests), need_top_k_sampling=True, need_top_p_sampling=False)
    return engine[1].compute_dflash_sampling_correct_drafts_and_bonus, {
        "candidates": torch.ones(requests, width).long(), "next_token_logits": torch.randn(requests * width, vocab),
        "sampling_info": info, "threshold_single": 1.0, "threshold_acc": 1.0}


def test_a_greedy_request_among_sampled_ones_takes_the_lowest_of_tied_tokens(engine):
    """In such a batch the engine gives it temperature 1 and top_k 1."""
    _, given = sampled(engine)
    given["sampling_info"].top_ks[1] = 1
    logits = given["next_token_logits"].view(3, 4, 12)
    logits[1] = 0.0
    logits[1, :, [3, 7, 8]] = 5.0
    given["candidates"][1] = 3
    for _ in range(20):
        accepted, bonus = sampling.compute_dflash_sampling_correct_drafts_and_bonus(**given)
        assert (int(accepted[1]), int(bonus[1])) == (3, 3)


def test_the_engine_measures_its_own_sampling(engine):
    _, given = sampled(engine)

    def _measure_sampling_peak():
        return sampling.compute_dflash_sampling_correct_drafts_and_bonus(**given)

    assert _measure_sampling_peak() is LEFT
    assert sampling.compute_dflash_sampling_correct_drafts_and_bonus(**given) is not LEFT


def test_a_fault_in_sampling(engine, monkeypatch, caplog):
    """The original says that there is no kernel for it here; on two ranks, whose numbers would differ, ours is told."""
    def broken(*args, **kwargs):
        raise RuntimeError("verify_sample is broken")

    loaded(engine)
    engine[1]._DFLASH_SAMPLING_VERIFY_AVAILABLE = False
    sample, given = sampled(engine)
    assert sample(**given)[0].shape == (3,)
    monkeypatch.setattr(sampling, "verify_sample", broken)
    monkeypatch.setattr(hooks, "_ranks", lambda: 2)
    with pytest.raises(RuntimeError, match="verify_sample is broken"):
        sample(**given)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unavailable on this build/device"):
            sample(**given)
    assert [r.levelname for r in caplog.records].count("WARNING") == 1


@pytest.mark.parametrize("change", [{"candidates": torch.ones(12).long()}, {"candidates": torch.ones(3, 4)},
                                    {"next_token_logits": torch.randn(11, 12)},
                                    {"next_token_logits": torch.randn(12, 24)[:, ::2]}])
def test_sampling_leaves_what_it_was_not_written_for(engine, change):
    _, given = sampled(engine)
    assert sampling.compute_dflash_sampling_correct_drafts_and_bonus(**given | change) is LEFT


def test_draft_head_leaves_what_it_was_not_written_for(engine):
    sampler = engine[0]._DflashDraftSampler(weight=torch.randn(50, HIDDEN), block_size=4, num_org=50,
                                            org_vocab_start=0, max_bs=2)
    for hidden in (torch.randn(7, HIDDEN), torch.randn(8, HIDDEN + 1), torch.randn(2, 4, HIDDEN)):
        assert head.winners(sampler, hidden) is LEFT
    assert head.winners(sampler, torch.randn(8, HIDDEN)) is not LEFT
