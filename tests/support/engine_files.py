"""Functions and classes out of an engine's source files, without the engine: build/peers/kernels has the files."""

import ast
import os
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDER = Path(os.environ.get("DFLASH_PEER_KERNELS") or ROOT / "build" / "peers" / "kernels")


def source(engine: str, path: str) -> Path:
    """The file; skips the test where it is missing."""
    file = FOLDER / engine / path
    if not file.exists():
        pytest.skip(f"{engine}/{path} is not in {FOLDER.name}, which `make peer-kernels` fills")
    return file


def take(engine: str, path: str, names: list[str], namespace: dict) -> dict:
    """Runs the definitions of `names` in namespace, with postponed annotations; returns it. A name is "function",
    "Class" or "Class.method,method", which gives a class of those methods alone."""
    tree = ast.parse(source(engine, path).read_text(encoding="utf-8"))
    body: list[ast.stmt] = [ast.parse("from __future__ import annotations").body[0]]
    for name in names:
        first, _, methods = name.partition(".")
        node = next(n for n in tree.body if getattr(n, "name", None) == first)
        if methods:
            node.body = [n for n in node.body if getattr(n, "name", None) in methods.split(",")]
            node.bases, node.decorator_list = [], []
        body.append(node)
    exec(compile(ast.Module(body, []), str(source(engine, path)), "exec"), namespace)
    return namespace
