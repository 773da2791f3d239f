"""The short names of dflash_decode, and what importing it and asking the command line for help do not load."""

import ast
import importlib
import subprocess
import sys

import pytest

import dflash_decode
from tests.support import ROOT, annotations

NAMES = {"CheckpointError": "checkpoint.errors", "CheckpointNotFound": "checkpoint.errors", "Decoder": "loop",
         "Chunk": "llm.outputs", "Completion": "llm.outputs", "GenerationError": "llm.outputs", "LLM": "llm.api",
         "GenerationParams": "llm.params", "TokenLogprobs": "logprobs",
         "Drafter": "model.drafter", "Event": "requests", "Request": "requests", "SamplingParams": "sampling",
         "Session": "session", "load_checkpoint": "checkpoint", "load_tokenizer": "checkpoint.tokenizer"}


def fresh(code):
    """Runs code in an interpreter of its own; what it printed."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                         env={"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PATH": ""})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_short_name_is_that_of_its_module():
    assert set(dflash_decode.__all__) == set(NAMES) and dir(dflash_decode) == dflash_decode.__all__
    for name, module in NAMES.items():
        value = getattr(dflash_decode, name)
        assert value is getattr(importlib.import_module(f"dflash_decode.{module}"), name)
        assert value.__module__ == f"dflash_decode.{module}"


@pytest.mark.parametrize("name", dflash_decode.__all__)
def test_short_names_have_their_types(name):
    assert annotations.missing(name, getattr(dflash_decode, name)) == []


def test_names_for_type_checkers_are_those_that_are_loaded():
    """The imports that a type checker reads, and the places that __getattr__ loads from."""
    tree = ast.parse((ROOT / "python/dflash_decode/__init__.py").read_text(encoding="utf-8"))
    block, = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: f".{node.module}" for node in block.body for alias in node.names}
    assert told == dflash_decode._WHERE


def test_a_name_that_is_none_is_an_error_and_modules_are_still_found():
    with pytest.raises(AttributeError, match="module 'dflash_decode' has no attribute 'Sessions'"):
        dflash_decode.Sessions  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Sessions'"):
        exec("from dflash_decode import Sessions")
    from dflash_decode import kv
    assert kv.__name__ == "dflash_decode.kv"


def test_importing_the_package_loads_nothing_and_a_name_loads_its_module():
    out = fresh("import sys\nbefore = set(sys.modules)\nimport dflash_decode\n"
                "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
                "assert new == {'dflash_decode'}, new\nfrom dflash_decode import SamplingParams\n"
                "print('dflash_decode.sampling' in sys.modules, 'dflash_decode.session' in sys.modules)")
    assert out == "True False\n"


def test_help_loads_no_torch():
    pytest.importorskip("typer")
    out = fresh("import sys\nfrom dflash_decode.cli import main\nsys.argv = ['dflash-kernels', '--help']\n"
                "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
                "print(sorted({'torch', 'numpy', 'dflash_kernels'} & set(sys.modules)))")
    assert "generate" in out and out.splitlines()[-1] == "[]"
