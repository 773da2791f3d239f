"""The words of an option are written once, and mean the same to the command line, the session, the loop and the op."""

import ast
import os
import subprocess
import sys

import pytest

from dflash_decode import choices
from dflash_decode.arguments import choice
from dflash_kernels.ops.sample import RULES
from tests.support import ROOT

KINDS = (choices.SampleFrom, choices.Rule, choices.Weights, choices.DraftersWeights)
PACKAGES = ("dflash_decode", "dflash_bench")


def test_the_rules_are_those_of_the_op():
    assert tuple(rule.value for rule in choices.Rule) == RULES


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_its_word(kind):
    assert all(word.name == word.value == word for word in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_is_one_of_its_words(kind):
    for word in kind:
        assert choice("f", "x", word.value, kind) == choice("f", "x", word, kind) == word.value
    words = ", ".join(word.value for word in kind)
    with pytest.raises(ValueError, match=f"^f: x must be one of {words}; got 'none'$"):
        choice("f", "x", "none", kind)
    with pytest.raises(TypeError, match=f"^f: x must be one of {words}; got 1$"):
        choice("f", "x", 1, kind)


def test_nobody_else_lists_or_compares_them():
    """Defaults and help name a word; a list of them, or a comparison with one, is elsewhere a second source."""
    words = {word.value for kind in KINDS for word in kind}
    found = []
    for package in PACKAGES:
        for file in sorted((ROOT / "python" / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.name != "choices.py" else ():
                parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else (
                    [node.left, *node.comparators] if isinstance(node, ast.Compare) else [])
                named = [p.value for p in parts if isinstance(p, ast.Constant) and p.value in words]
                if named and (isinstance(node, ast.Compare) or len(named) > 1):
                    found.append((file.name, node.lineno, *named))
    assert not found, found


HELP = """
import sys
from dflash_decode.cli import app

try:
    app.app(["generate", "--help"])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_the_help_lists_them_without_torch():
    pytest.importorskip("typer")
    ran = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60,
                         env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "COLUMNS": "200"})
    assert ran.stderr.strip() == "False"
    for kind in KINDS:
        assert "|".join(word.value for word in kind) in ran.stdout
