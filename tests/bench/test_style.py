"""The sizes that CONTRIBUTING.md names: of files, of functions and kernels, of lines."""

import ast

import pytest

from tests.support import ROOT

FILE, FUNCTION, KERNEL, LINE = 320, 60, 150, 120
LONGER = {
    "csrc/cpu/vec.h": "one vector type in three widths, whose operations are compared side by side",
    "tests/triton/test_triton_attention.py": "one kernel over both kinds of caches, by the same helpers",
}
FOLDERS = ("dflash_kernels", "python", "csrc", "bench", "tools", "tests", "drafters")
PYTHON = [ROOT / "setup.py", *(f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*.py")))]
CPP = [f for folder in ("csrc", "tests") for f in sorted((ROOT / folder).rglob("*"))
       if f.suffix in (".cpp", ".h", ".cu", ".cuh")]


def named(file):
    return file.relative_to(ROOT).as_posix()


def functions(file):
    """(name, lines, limit) of each: the arguments and the docstring are as long as what they describe."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield f"{named(file)}: {node.name}", node.end_lineno - first.lineno + 1, KERNEL if kernel else FUNCTION


def length(file):
    """Lines, but for docstrings: those are as long as what they describe."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return text.count("\n")
    documented = (node for node in ast.walk(ast.parse(text))
                  if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
    docstrings = [node.body[0] for node in documented if ast.get_docstring(node)]
    return text.count("\n") - sum(d.end_lineno - d.lineno + 1 for d in docstrings)


def test_files_are_short():
    lines = {named(f): length(f) for f in (*PYTHON, *CPP)}
    assert len(PYTHON) > 250 and len(CPP) > 50
    assert {name: n for name, n in lines.items() if n > FILE}.keys() == LONGER.keys()


def test_functions_are_short():
    found = [each for file in PYTHON for each in functions(file)]
    assert len(found) > 2000 and any(limit == KERNEL for *_, limit in found)
    assert [each for each in found if each[1] > each[2]] == []


@pytest.mark.parametrize("files", [PYTHON, CPP], ids=["python", "c++"])
def test_lines_are_short(files):
    long = [f"{named(f)}:{at}" for f in files
            for at, line in enumerate(f.read_text(encoding="utf-8").splitlines(), 1) if len(line) > LINE]
    assert long == []
