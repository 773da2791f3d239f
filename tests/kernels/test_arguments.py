"""An op's arguments are those of its schema, by name, order and type, in everything that answers it."""

import inspect
import re

import pytest
import torch

from dflash_kernels import _library, _triton
from tests.support import ROOT

BINDINGS = sorted(ROOT.glob("csrc/bindings/**/*.cpp"))
# What torch's stable ABI hands to a function for an argument of each type.
CPP = {"Tensor": "Tensor", "Optional[Tensor]": "std::optional<Tensor>", "List[Tensor]": "std::vector<Tensor>",
       "int": "int64_t", "float": "double", "bool": "bool"}


def schema(op):
    return [(a.name, str(a.type)) for a in getattr(torch.ops.dflash, op).default._schema.arguments]


def without_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def registered(text):
    """op: its function, as a file of bindings registers them; on a CPU, and as an op of the CUDA library."""
    return dict(re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&(\w+)\)\)', text)
                + re.findall(r'BoxedOp \w+\{"(\w+)", TORCH_BOX\(&(\w+)\)\}', text))


def parameters(text, function):
    """(name, type) of each parameter of a function that is defined in text."""
    names = dict(re.findall(r"using (\w+) = ([^;]+);", text))
    (found,) = re.findall(rf"\bvoid {function}\(([^)]*)\) \{{", text)
    pairs = []
    for parameter in found.split(","):
        kind, name = re.fullmatch(r"\s*(?:const )?(.+?)&?\s+(\w+)\s*", parameter, re.S).groups()
        pairs.append((name, names.get(kind, kind)))
    return pairs


def bound():
    """(file, op): the parameters of its binding."""
    found = {}
    for file in BINDINGS:
        text = without_comments(file.read_text(encoding="utf-8"))
        for op, function in registered(text).items():
            found[file.relative_to(ROOT / "csrc" / "bindings").as_posix(), op] = parameters(text, function)
    return found


BOUND = bound()


@pytest.mark.parametrize("op", _library.NAMES)
def test_the_reference_has_the_arguments_of_its_op(op):
    function = _library.REFERENCES[op]
    assert function.__name__ == op
    assert list(inspect.signature(function).parameters) == [name for name, _ in schema(op)]


@pytest.mark.parametrize("op", _library.NAMES)
def test_the_launcher_has_the_arguments_of_its_op(op):
    pytest.importorskip("triton")
    function = _triton.load(_triton.LAUNCHERS[op])
    assert function.__name__ == op
    assert list(inspect.signature(function).parameters) == [name for name, _ in schema(op)]


@pytest.mark.parametrize("file,op", BOUND)
def test_the_binding_has_the_arguments_of_its_op(file, op):
    assert BOUND[file, op] == [(name, CPP[kind]) for name, kind in schema(op)]


def test_every_op_is_bound_on_a_cpu_and_has_a_launcher():
    assert sorted(op for file, op in BOUND if not file.startswith("cuda/")) == sorted(_library.NAMES)
    assert {op for file, op in BOUND if file.startswith("cuda/")} == _library._gpu.CHOICE.keys()
    assert _triton.LAUNCHERS.keys() == set(_library.NAMES)


def test_a_binding_s_parameters_are_read_from_its_text():
    text = """using Maybe = std::optional<Tensor>;
    void f(const Tensor& x, const Maybe& bias,  // of x
           std::vector<Tensor> more, int64_t n, const std::optional<Tensor>& y, double z, bool w) {"""
    assert parameters(without_comments(text), "f") == [
        ("x", "Tensor"), ("bias", "std::optional<Tensor>"), ("more", "std::vector<Tensor>"), ("n", "int64_t"),
        ("y", "std::optional<Tensor>"), ("z", "double"), ("w", "bool")]
