"""The way back from a replacement to the engine's own function, and what is decided once for a model."""

import logging
import types

import pytest

from dflash_engines import hooks, sglang, vllm
from dflash_engines.hooks import LEFT, guarded, plan

LOG = logging.getLogger("tests.engines")


def calls(ours, **options):
    """A guarded call whose original answers "theirs", and how often it did."""
    seen = []
    return guarded("scale", ours, lambda *args: seen.append(args) or "theirs", LOG, **options), seen


def test_what_is_left_goes_to_the_original_and_the_next_comes_back():
    call, seen = calls(lambda x: "ours" if x else LEFT)
    assert [call(1), call(0), call(1)] == ["ours", "theirs", "ours"] and seen == [(0,)]


def test_a_failure_goes_to_the_original_once_said_and_for_good(caplog):
    tried = []

    def ours(x):
        tried.append(x)
        raise RuntimeError("no kernel image is available")

    call, seen = calls(ours)
    assert [call(1), call(2), call(3)] == ["theirs"] * 3 and seen == [(1,), (2,), (3,)] and tried == [1]
    said, = caplog.records
    assert said.levelname == "WARNING" and said.exc_info[1].args == ("no kernel image is available",)
    assert said.getMessage() == ("dflash-kernels: scale: failed and is now off in this process. "
                                 "RuntimeError: no kernel image is available")


def test_the_originals_own_exception_is_its_own():
    def theirs():
        raise KeyError("theirs")

    with pytest.raises(KeyError) as found:
        guarded("scale", lambda: 1 / 0, theirs, LOG)()
    assert not isinstance(found.value.__context__, ZeroDivisionError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through_and_turns_nothing_off(error, caplog):
    answers = [error, None]

    def ours():
        if raised := answers.pop(0):
            raise raised
        return "ours"

    call, seen = calls(ours)
    with pytest.raises(error):
        call()
    assert call() == "ours" and not seen and not caplog.records


def test_ranks_that_would_draw_differently_raise_instead(monkeypatch):
    monkeypatch.setattr(hooks, "_ranks", lambda: 2)
    call, seen = calls(lambda: 1 / 0, diverges=True)
    with pytest.raises(ZeroDivisionError):
        call()
    assert not seen and calls(lambda: 1 / 0)[0]() == "theirs"  # where both ways give the same, nobody parts
    monkeypatch.setattr(hooks, "_ranks", lambda: 1)
    assert calls(lambda: 1 / 0, diverges=True)[0]() == "theirs"


def test_hooks_whose_ranks_would_part_are_marked():
    """Those that draw, and those whose results every rank has and that can differ from the original's in a bit."""
    assert {hook.name for hook in vllm.hooks() if hook.diverges} == {"verify_v2", "grouped_conv", "selector"}
    assert {hook.name for hook in sglang.hooks() if hook.diverges} == {"sampling", "grouped_conv", "selector"}


def test_no_way_back_once_the_collectives_have_begun():
    begun = []

    def finish(found, x):
        begun.append((found, x))
        raise ConnectionError("a rank is gone")

    call, seen = calls(lambda x: 2 * x, finish=finish)
    with pytest.raises(ConnectionError):
        call(3)
    assert begun == [(6, 3)] and not seen
    assert calls(lambda x: LEFT, finish=finish)[0](3) == "theirs"


def test_a_plan_is_made_once(caplog):
    owner, made = types.SimpleNamespace(heads=3), []

    def decide(owner):
        made.append(owner)
        return (owner.heads,)

    with caplog.at_level(logging.INFO):
        assert plan(owner, "head", decide, LOG) == plan(owner, "head", decide, LOG) == (3,)
    assert len(made) == 1 and caplog.messages == ["dflash-kernels: head: active for this model"]


def test_no_plan_is_made_while_a_graph_is_captured(monkeypatch):
    owner = types.SimpleNamespace()
    for answer, expected in ((True, None), (False, 7), (True, 7)):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda answer=answer: answer)
        assert plan(owner, "head", lambda owner: 7, LOG) == expected


def test_a_configuration_that_is_not_covered_is_not_looked_at_again(caplog):
    owner = types.SimpleNamespace()
    with caplog.at_level(logging.INFO):
        assert [plan(owner, "head", lambda owner: "2 ranks", LOG) for _ in range(2)] == [None, None]
    assert caplog.messages == ["dflash-kernels: head: not active for this model, 2 ranks"]
