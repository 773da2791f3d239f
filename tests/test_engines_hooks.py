"""The gate that every hook into an engine goes through, against a made-up engine."""

import logging
import sys
import types

import pytest

from dflash_decode.engines.hooks import Hook, install, plan

LOG = logging.getLogger("tests.engines")


@pytest.fixture
def engine(monkeypatch):
    """`nosuchengine.kernels` with a function and a class, and `nosuchengine.worker`, which imported the function."""
    package, kernels, worker = (types.ModuleType(n) for n in (
        "nosuchengine", "nosuchengine.kernels", "nosuchengine.worker"))

    def scale(x, factor):
        return x * factor

    class Base:
        def step(self, x):
            return x + 1

    class Model(Base):
        pass

    kernels.scale, kernels.Base, kernels.Model, worker.scale = scale, Base, Model, scale
    package.__path__ = []
    for module in (package, kernels, worker):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return kernels, worker


def hook(**changes):
    given = {"name": "scale", "target": "nosuchengine.kernels:scale", "parameters": (("x", "factor"),),
             "versions": ((1, 2), (1, 4)), "build": lambda original: lambda x, factor: -original(x, factor)}
    return Hook(**given | changes)


def run(hooks, version="1.3.0+cpu", environment=None):
    return install(hooks, version, environment or {}, "DFLASH_FAKE", LOG)


def test_replaced_where_defined_and_where_imported(engine, caplog):
    kernels, worker = engine
    with caplog.at_level(logging.INFO):
        assert [o.why for o in run([hook()])] == [""]
    assert kernels.scale(2, 3) == worker.scale(2, 3) == -6 and kernels.scale.__name__ == "scale"
    assert [r.getMessage() for r in caplog.records] == [
        "dflash-kernels: scale: replaced (nosuchengine.kernels:scale)"]


def test_twice_is_once(engine):
    kernels, _ = engine
    run([hook()])
    assert run([hook()])[0].why == ""
    assert kernels.scale(2, 3) == -6  # not wrapped twice


def test_a_method_is_replaced_on_its_class_alone(engine):
    kernels, _ = engine
    step = hook(target="nosuchengine.kernels:Model.step", parameters=(("self", "x"),),
                build=lambda original: lambda self, x: original(self, x) * 10)
    assert run([step])[0].why == ""
    assert kernels.Model().step(1) == 20 and kernels.Base().step(1) == 2


@pytest.mark.parametrize("changes, version, why", [
    ({"parameters": (("x",), ("x", "scale"))}, "1.3", "its parameters changed: without scale and with factor"),
    ({"parameters": (("factor", "x"),)}, "1.3", "its parameters changed: in another order, x, factor"),
    ({"target": "nosuchengine.gone:scale"}, "1.3", "ModuleNotFoundError: No module named 'nosuchengine.gone'"),
    ({"target": "nosuchengine.kernels:gone"}, "1.3", "AttributeError: module 'nosuchengine.kernels' has no attribute "
                                                     "'gone'"),
    ({}, "1.4.0", "version 1.4.0 is not of 1.2 to before 1.4"),
    ({}, "1.1.9", "version 1.1.9 is not of 1.2 to before 1.4"),
    ({}, "dev", "version dev is not of 1.2 to before 1.4"),
    ({"keep": lambda: "no GPU"}, "1.3", "no GPU"),
    ({"off": lambda: "slower on a CPU"}, "1.3", "slower on a CPU"),
    ({"build": lambda original: 1 / 0}, "1.3", "ZeroDivisionError: division by zero"),
])
def test_left_in_place(engine, caplog, changes, version, why):
    kernels, worker = engine
    original = kernels.scale
    with caplog.at_level(logging.INFO):
        found = run([hook(**changes), hook(name="second", target="nosuchengine.kernels:Model.step",
                                           parameters=(("self", "x"),), versions=((1, 0), (9, 0)))], version)
    assert found[0].why == why and kernels.scale is worker.scale is original
    assert found[1].why == ("" if version != "dev" else "version dev is not of 1.0 to before 9.0")  # others go on
    assert f"dflash-kernels: scale: left, {why} (" in caplog.text


def test_an_import_that_raises(engine, monkeypatch, tmp_path):
    (tmp_path / "explodes.py").write_text("raise OSError('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    assert run([hook(target="explodes:scale")])[0].why == "OSError: no such library"


def test_disabled_by_name_and_enabled_by_name(engine, caplog):
    kernels, _ = engine
    step = hook(name="step", target="nosuchengine.kernels:Model.step", parameters=(("self", "x"),),
                off=lambda: "slower here")
    found = run([hook(), step], environment={"DFLASH_FAKE_DISABLE": "scale, typo", "DFLASH_FAKE_ENABLE": "step"})
    assert [o.why for o in found] == ["disabled by DFLASH_FAKE_DISABLE", ""]
    assert kernels.scale(2, 3) == 6
    assert "DFLASH_FAKE_DISABLE must be of scale,step; got typo" in caplog.text


def test_a_plan_is_made_once(caplog):
    owner, calls = types.SimpleNamespace(heads=3), []

    def decide(owner):
        calls.append(owner)
        return (owner.heads,)

    with caplog.at_level(logging.INFO):
        assert plan(owner, "head", decide, LOG) == plan(owner, "head", decide, LOG) == (3,)
    assert len(calls) == 1 and caplog.messages == ["dflash-kernels: head: in use for this model"]


def test_no_plan_is_made_while_a_graph_is_captured(monkeypatch):
    owner = types.SimpleNamespace()
    for answer, expected in ((True, None), (False, 7), (True, 7)):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda answer=answer: answer)
        assert plan(owner, "head", lambda owner: 7, LOG) == expected


@pytest.mark.parametrize("decide, why", [(lambda owner: "2 ranks", "2 ranks"),
                                         (lambda owner: owner.gone, "AttributeError: ")])
def test_a_plan_that_cannot_be_made_is_not_tried_again(caplog, decide, why):
    owner = types.SimpleNamespace()
    with caplog.at_level(logging.INFO):
        assert plan(owner, "head", decide, LOG) is None and plan(owner, "head", decide, LOG) is None
    assert len(caplog.messages) == 1 and f"head: left, {why}" in caplog.text
