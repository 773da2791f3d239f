"""An engine's process before a DFlash configuration is seen: the plugins import nothing and change nothing."""

import importlib
import logging
import subprocess
import sys

import pytest

from dflash_engines import watch
from dflash_engines.watch import when_imported, when_made
from tests.support import ROOT

LOG = logging.getLogger("tests.engines")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`nosuchengine.proposer`, a file, not yet imported."""
    folder = tmp_path / "nosuchengine"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "proposer.py").write_text("RUNS = globals().get('RUNS', 0) + 1\n\n\nclass Proposer:\n"
                                        "    def __init__(self, config, device=None):\n        self.config = config\n")
    (folder / "broken.py").write_text("raise OSError('no such library')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(watch, "_FINDER", watch._Finder())
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "nosuchengine"]:
        del sys.modules[name]


def test_called_right_after_the_import_and_once(package):
    seen = []
    for _ in range(2):  # a process may load plugins twice
        when_imported("nosuchengine.proposer", seen.append, LOG)
    assert not seen and "nosuchengine" not in sys.modules  # nothing is imported for it
    module = importlib.import_module("nosuchengine.proposer")
    assert seen == [module] and module.RUNS == 1 and module.Proposer
    assert "exec_module" not in vars(module.__loader__)  # the loader is as it was
    importlib.reload(module)
    assert seen == [module] and module.RUNS == 2


def test_called_at_once_where_it_is_imported_already(package):
    module, seen = importlib.import_module("nosuchengine.proposer"), []
    when_imported("nosuchengine.proposer", seen.append, LOG)
    assert seen == [module]


def test_what_it_raises_is_not_in_the_way(package, caplog):
    seen = []
    when_imported("nosuchengine.proposer", lambda module: module.gone, LOG)
    when_imported("nosuchengine.proposer", seen.append, LOG)
    assert importlib.import_module("nosuchengine.proposer").RUNS == 1 and len(seen) == 1
    assert "nothing replaced, AttributeError: " in caplog.text and "has no attribute 'gone'" in caplog.text


def test_an_import_that_fails_fails_as_it_did(package):
    seen = []
    when_imported("nosuchengine.broken", seen.append, LOG)
    when_imported("nosuchengine.gone", seen.append, LOG)
    with pytest.raises(OSError, match="no such library"):
        importlib.import_module("nosuchengine.broken")
    with pytest.raises(ModuleNotFoundError, match="nosuchengine.gone"):
        importlib.import_module("nosuchengine.gone")
    (package / "broken.py").write_text("WHOLE = True\n")
    assert importlib.import_module("nosuchengine.broken").WHOLE and len(seen) == 1


def test_another_finder_that_does_the_same(package):
    """vLLM has such ones itself."""
    seen = []

    class Theirs(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name != "nosuchengine.proposer" or self not in sys.meta_path:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), seen.append("theirs"))
            return spec

    when_imported("nosuchengine.proposer", lambda module: seen.append("ours"), LOG)
    sys.meta_path.insert(0, Theirs())
    assert importlib.import_module("nosuchengine.proposer").RUNS == 1 and seen == ["ours", "theirs"]


def test_made_is_seen_before_it_is_made(package, caplog):
    cls, seen = importlib.import_module("nosuchengine.proposer").Proposer, []

    def then(arguments):
        seen.append((hasattr(arguments["self"], "config"), arguments["config"]))
        return 1 / arguments["config"]

    when_made(cls, then, LOG)
    when_made(cls, then, LOG)
    assert cls(2).config == 2 and cls(config=3, device="cpu").config == 3 and seen == [(False, 2), (False, 3)]
    assert cls(0).config == 0 and "nothing replaced, ZeroDivisionError" in caplog.text
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'config'"):
        cls()


ENGINES = {  # what a process has imported of an engine when it loads plugins, and what brings DFlash
    "vllm": ("vllm vllm.v1.attention.backends.registry", "vllm.v1.spec_decode.dflash vllm.v1.sample.rejection_sampler "
             "vllm.model_executor.models.qwen3_dflash vllm.v1.spec_decode.llm_base_proposer"),
    "sglang": ("sglang sglang.version sglang.srt.plugins.hook_registry",
               "sglang.srt.speculative.dflash_worker_v2 sglang.srt.speculative.dflash_utils")}
SCRIPT = """
import sys
engine, there, later = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
for name in there:
    __import__(name)
before = set(sys.modules)
import importlib
plugin = importlib.import_module(f"dflash_engines.{engine}")
assert plugin.register() is None is plugin.register()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not set(later) & set(sys.modules), sorted(set(later) & set(sys.modules))
print(len(set(sys.modules) - before), "torch" in sys.modules, engine in new, "dflash_kernels" in new)
"""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("when", ["before the engine", "in the engine"])
def test_register_imports_nothing_heavy(engine, when, tmp_path):
    """It took 5.7 s, 971 modules and 73 MiB in every process, DFlash or not. Here the engine is empty files."""
    there, later = ENGINES[engine]
    for name in f"{there} {later}".split():
        file = tmp_path / f"{name.replace('.', '/')}.py"
        for folder in [file.with_suffix(""), *file.parents]:
            if folder.is_relative_to(tmp_path / engine):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").touch()
    (tmp_path / engine / "__init__.py").write_text("__version__ = '0.32.0'")
    run = subprocess.run([sys.executable, "-c", SCRIPT, engine, there if when == "in the engine" else "", later],
                         env={"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}:{tmp_path}", "PATH": ""}, capture_output=True,
                         text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    modules, torch, heavy, ours = run.stdout.split()
    assert (torch, heavy, ours) == ("False", "False", "False") and int(modules) < 100, run.stdout


WITHOUT = """
import importlib, sys
from dflash_engines import vllm as plugin
plugin.register()
for name in [*plugin.PROPOSERS, plugin.REGISTRY]:
    importlib.import_module(name)
from vllm.v1.spec_decode.dflash import DFlashProposer
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print(*sorted(name for name in sys.modules if name.startswith("dflash")))
finders = [type(finder).__module__ for finder in sys.meta_path]
print("torch" in sys.modules, finders.count("dflash_engines.watch"))
public = sorted(name for name in vars(DFlashProposer) if name[0] != "_")
print(public, hasattr(DFlashProposer.__init__, "dflash_watched"), AttentionBackendEnum.__members__)
"""
REGISTRY = """
class AttentionBackendEnum:
    __members__ = {}
def register_backend(backend, class_path=None, is_mamba=False):
    AttentionBackendEnum.__members__[backend] = 1
"""


def test_what_stays_in_a_server_without_dflash(tmp_path):
    """What the first paragraph of docs/engines.md says, and nothing more."""
    contents = {"vllm": "__version__ = '0.32.0'", "vllm.v1.attention.backends.registry": REGISTRY,
                "vllm.v1.spec_decode.dflash": "class DFlashProposer:\n    def propose(self):\n        pass",
                "vllm.v1.worker.gpu.spec_decode.dflash.speculator": "class DFlashSpeculator:\n    pass",
                "vllm.v1.worker.gpu.spec_decode.dflash2.speculator": "class DFlash2Speculator:\n    pass"}
    for name, text in contents.items():
        folder = tmp_path / name.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(text)
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=tmp_path,
                         env={"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}:{tmp_path}", "PATH": ""})
    assert run.returncode == 0, run.stderr
    modules, others, engine = run.stdout.splitlines()
    inner = ("hooks", "sources", "vllm", "vllm.attention", "vllm.backend_name", "watch")
    assert modules.split() == ["dflash_engines", *(f"dflash_engines.{n}" for n in inner)]
    assert (others, engine) == ("False 1", "['propose'] True {'DFLASH': 1}")
