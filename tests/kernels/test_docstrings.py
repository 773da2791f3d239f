"""Docstrings of public names: every argument is described, and the examples run."""

import doctest
import inspect
import re

import pytest

from bench.report import docstrings
from bench.report.ops_page import public
from dflash_kernels import StepGraph, build_info

PUBLIC = public()
MEMBERS = {f"{name}.{member}": found for name, item in PUBLIC.items() if inspect.isclass(item)
           for member, found in docstrings.members(item).items()}
METHODS = {name: found for name, found in MEMBERS.items() if not isinstance(found, property)}


def parameters(item):
    found = inspect.signature(getattr(item, "__func__", item)).parameters.values()
    return [f"{'*' * (p.kind is p.VAR_POSITIONAL)}{p.name}" for p in found if p.name not in ("self", "cls")]


def returns(item):
    return inspect.signature(getattr(item, "__func__", item)).return_annotation


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_every_argument_is_described(name):
    item = {**PUBLIC, **METHODS}[name]
    doc = docstrings.parse(item.__doc__)
    assert doc.summary.endswith(".")
    assert item.__doc__.split("\n\n")[0].count("\n") == 0, "the summary is one line"
    described = [n for entry in doc.fields.get("Parameters", []) for n in entry.names]
    assert sorted(described) == sorted(parameters(item))
    for title in ("Parameters", "Attributes", "Returns"):
        assert all(entry.kind or entry.text for entry in doc.fields.get(title, []))
    assert all(entry.text for entry in doc.fields.get("Raises", []))


@pytest.mark.parametrize("name", [name for name in (*PUBLIC, *METHODS) if not inspect.isclass(PUBLIC.get(name))])
def test_results_are_described(name):
    item = {**PUBLIC, **METHODS}[name]
    described = docstrings.parse(item.__doc__).fields.get("Returns", [])
    nothing = returns(item) is None
    assert bool(described) != nothing
    if str(returns(item)).startswith("tuple[torch.Tensor"):
        assert sum(len(entry.names or "1") for entry in described) == str(returns(item)).count(",") + 1


@pytest.mark.parametrize("name", [name for name, item in PUBLIC.items() if inspect.isclass(item)])
def test_every_member_is_described(name):
    attributes = docstrings.parse(PUBLIC[name].__doc__).fields.get("Attributes", [])
    described = {n for entry in attributes for n in entry.names} | {*docstrings.members(PUBLIC[name])}
    there = {n for n, member in vars(PUBLIC[name]).items() if not n.startswith("_")
             and (callable(member) or isinstance(member, (property, staticmethod, classmethod)))}
    assert there == described & there and described <= {*vars(PUBLIC[name])}


@pytest.mark.parametrize("name", [*PUBLIC, *MEMBERS])
def test_the_example_runs(name):
    if name.startswith("StepGraph") and not StepGraph.available("cpu"):
        pytest.skip("the C++ library is not built")
    example = docstrings.parse({**PUBLIC, **MEMBERS}[name].__doc__).texts.get("Examples", "")
    test = doctest.DocTestParser().get_doctest(example, {}, name, None, 0)
    called = re.compile(rf"\.{name.split('.')[1]}\b" if name in MEMBERS else rf"\b{name}\(")
    calls = [step for step in test.examples if called.search(step.source)]
    assert calls or inspect.isclass(PUBLIC.get(name)), "the example calls it"
    assert any(step.want for step in test.examples) or name.startswith("assert_"), "the example shows a result"
    report = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=report.append).failed == 0, "".join(report)


@pytest.mark.parametrize("op", build_info()["ops"])
def test_an_op_has_its_errors_source_and_graph_safety(op):
    doc = docstrings.parse(PUBLIC[op].__doc__)
    assert {"TypeError", "ValueError"} <= {n for entry in doc.fields["Raises"] for n in entry.names}
    assert "Graph-safe. Source: " in doc.texts["Notes"]


@pytest.mark.parametrize("text, message", [
    ("It runs.\n\nReturns\n-------\nx : int\n\nParameters\n----------\ny : int", "in this order"),
    ("It runs.\n\nOptions\n-------\nx : int", "in this order"),
    ("It runs.\n\nReturns\n-------\nx : int\n\nReturns\n-------\nx : int", "in this order"),
    ("It runs.\n\nParameters\n\nx : int", "underlined"),
    ("It runs.\n\nParameters\n----------\n    x : int", "margin"),
])
def test_a_malformed_docstring_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        docstrings.parse(text)
