"""Arrows between packages point one way, and no modules import each other in a circle."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

# What each package may import of ours. `tools` and `bench` are of the repository alone.
MAY = {"dflash_kernels": set(),
       "dflash_decode": {"dflash_kernels"},
       "dflash_engines": {"dflash_kernels"},
       "dflash_bench": {"dflash_kernels", "dflash_decode"},
       "dflash_serve": {"dflash_kernels", "dflash_decode"},
       "bench": {"dflash_kernels", "dflash_decode", "dflash_engines", "dflash_bench", "dflash_serve",
                 "setup"},
       "tools": {"dflash_kernels", "dflash_decode", "bench", "setup"}}
FOLDERS = {name: ROOT / "python" / name if name.startswith("dflash_") and name != "dflash_kernels" else ROOT / name
           for name in MAY}
PUBLIC = ("dflash_kernels", "dflash_kernels.testing", "dflash_kernels.reference", "dflash_kernels.formats")


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(module: str, text: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules that a module's text imports, at the top or inside functions."""
    found, package = set(), module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[:len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            whole = {f"{base}.{alias.name}" for alias in node.names}
            found |= whole & known
            if not whole <= known:
                found.add(base)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, file.read_text(encoding="utf-8"), file.name == "__init__.py", set(known))
            for name, file in known.items()}


def test_arrows_between_packages_point_one_way(graph):
    ours = {*MAY, "setup", "tests"}
    wrong = {(name, other) for name, others in graph.items() for other in others
             if other.split(".")[0] in ours - MAY[name.split(".")[0]] - {name.split(".")[0]}}
    assert not wrong


def test_packages_use_public_names_of_the_ops_alone(graph):
    wrong = {(name, other) for name, others in graph.items() for other in others
             if name.split(".")[0] in ("dflash_decode", "dflash_engines", "dflash_bench", "dflash_serve")
             and other.split(".")[0] == "dflash_kernels"
             and other not in PUBLIC and other.rpartition(".")[0] != "dflash_kernels.reference"}
    assert not wrong


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules from which a path of imports leads back to themselves."""
    def reached(start):
        seen, left = set(), [start]
        while left:
            for other in graph.get(left.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    left.append(other)
        return seen

    return {name for name in graph if name in reached(name)}


def test_no_modules_import_each_other_in_a_circle(graph):
    assert circles(graph) == set()


def test_a_circle_and_a_lazy_import_are_seen():
    known = {"p", "p.a", "p.b", "q"}
    texts = {"p.a": "from . import b", "p.b": "def f():\n    from .a import g", "q": "import p.a"}
    found = {name: imported(name, text, False, known) for name, text in texts.items()}
    assert found == {"p.a": {"p.b"}, "p.b": {"p.a"}, "q": {"p.a"}} and circles(found) == {"p.a", "p.b"}
