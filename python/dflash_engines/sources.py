"""Digests of functions' sources, to tell whether an engine's function is the one that a hook was written for."""

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def digest(sources: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()[:16]


def of_function(function: Callable) -> str:
    """The source of a Python function's definition, with decorators and comments, dedented.

    It is found by the function's code, not by its name, so a replaced function gives the source of its replacement,
    with or without functools.wraps. Of a Triton kernel or a function under torch.compile it is the one that was given
    to them. Raises OSError if there is no file.
    """
    code = _given(function).__code__
    text = Path(code.co_filename).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and _first_line(node) == code.co_firstlineno:
            return _lines(text, node)
    raise OSError(f"no source of {code.co_name} in {code.co_filename}")


def of_file(file: Path, path: str) -> str:
    """The same for "function" or "Class.method", without importing the file."""
    text = file.read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for name in path.split("."):
        found = [n for n in node.body if getattr(n, "name", None) == name]
        if not found:
            raise OSError(f"no {path} in {file.name}")
        node = found[-1]
    return _lines(text, node)


def of_folder(folder: Path, targets: Iterable[str]) -> str:
    """The digest of the named functions, each "module:function" or "module:Class.method"."""
    pairs = (target.split(":") for target in targets)
    return digest(of_file(folder / f"{module.replace('.', '/')}.py", path) for module, path in pairs)


def resolve(target: str) -> tuple[object, str, Callable]:
    """The owner, attribute name and function of "module:function" or "module:Class.method"."""
    module, _, path = target.partition(":")
    *owners, attribute = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    found = getattr(owner, attribute)
    return owner, attribute, getattr(found, "__func__", found)


def _given(function: Any) -> Any:
    if not inspect.isfunction(function):
        return getattr(function, "fn", function)
    compiled = "/torch/_dynamo/" in function.__code__.co_filename  # functools.wraps copies torch's attribute elsewhere
    return getattr(function, "_torchdynamo_orig_callable", function) if compiled else function


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _lines(text: str, node: ast.FunctionDef) -> str:
    lines = text.split("\n")[_first_line(node) - 1:node.end_lineno]
    return textwrap.dedent("\n".join(line.rstrip() for line in lines))
