"""The gate that every hook into an engine goes through, against a made-up engine."""

import functools
import importlib.util
import logging
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch

import dflash_kernels
from dflash_engines import digests as digests_command
from dflash_engines import sources
from dflash_engines.hooks import LEFT, Choice, Hook, install, platform_of

LOG = logging.getLogger("tests.engines")
ENGINE = '''
def scale(x, factor):
    """A function with a body."""
    return x * factor


class Base:
    def step(self, x):
        return x + 1  # a comment counts too

    def walk(self, found, *, by=1):
        return ("walked", found, by)


class Model(Base):
    @classmethod
    def named(cls, x):
        return cls.__name__, x
'''


def module(name, text, folder):
    """From a file, as an engine's: its functions have sources."""
    file = Path(tempfile.mkdtemp(dir=folder)) / f"{name.rpartition('.')[2]}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """`nosuchengine.kernels` with a function and classes, and `nosuchengine.worker`, which imported the function."""
    package, worker = types.ModuleType("nosuchengine"), types.ModuleType("nosuchengine.worker")
    kernels = module("nosuchengine.kernels", ENGINE, tmp_path)
    worker.scale, package.__path__ = kernels.scale, []
    for made in (package, kernels, worker):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return kernels, worker


def digests(*targets):
    return sources.digest(sources.of_function(sources.resolve(f"nosuchengine.kernels:{t}")[2]) for t in targets)


def hook(target="scale", **changes):
    given = {"name": "scale", "target": f"nosuchengine.kernels:{target}", "ours": lambda x, factor: -x * factor,
             "read": {"1.3.0": digests("Base.step" if target == "Model.step" else target)}, "measured": {"cpu": True}}
    return Hook(**given | changes)


STEP = {"name": "step", "target": "Model.step", "ours": lambda self, x: (x + 1) * 10,
        "defined": "nosuchengine.kernels:Base.step"}


def run(given, version="1.3.0+cpu", platform="cpu", **environment):
    environment = {f"DFLASH_FAKE_{name}": value for name, value in environment.items()}
    choice = Choice.of(environment, "DFLASH_FAKE", [h.name for h in given], LOG)
    return install(given, version, platform, choice, LOG)


def test_replaced_where_defined_and_where_imported(engine, caplog):
    kernels, worker = engine
    with caplog.at_level(logging.INFO):
        assert [o.why for o in run([hook()])] == [""]
    assert kernels.scale(2, 3) == worker.scale(2, 3) == -6 and kernels.scale.__name__ == "scale"
    assert caplog.messages == ["dflash-kernels: scale: replaced (nosuchengine.kernels:scale)"]


def test_twice_is_once(engine):
    kernels, _ = engine
    run([hook()])
    once = kernels.scale
    assert run([hook(read={"1.3.0": "what it was before"})])[0].why == "" and kernels.scale is once


def test_a_method_is_replaced_on_its_class_alone(engine):
    kernels, _ = engine
    assert run([hook(**STEP)])[0].why == ""
    assert kernels.Model().step(1) == 20 and kernels.Base().step(1) == 2


def test_a_classmethod_stays_one(engine):
    kernels, _ = engine
    assert run([hook("Model.named", ours=lambda cls, x: LEFT if x else "ours")])[0].why == ""
    assert kernels.Model.named(0) == kernels.Model().named(0) == "ours" and kernels.Model().named(7) == ("Model", 7)


PAIR = {"target": "Model.step", "ours": lambda self, x: ("put off", x) if x else LEFT,
        "taker": "nosuchengine.kernels:Model.walk", "take": lambda self, found, *, by=1: ("ours", *found.made, by)}


def pair(**changes):
    read = digests("Base.step", "Base.walk")
    return hook(**{**PAIR, "read": {"1.3.0": read}, **changes})


def test_two_functions_are_replaced_as_one(engine, caplog):
    model = engine[0].Model()
    with caplog.at_level(logging.INFO):
        assert [o.why for o in run([pair()])] == [""]
    assert len(caplog.messages) == 1
    assert model.walk(model.step(3), by=2) == ("ours", "put off", 3, 2)
    assert model.walk(model.step(0)) == ("walked", 1, 1)  # what ours left
    assert model.walk(found=5) == ("walked", 5, 1)  # what comes from elsewhere
    again = engine[0].Model.walk
    run([pair()])
    assert engine[0].Model.walk is again


@pytest.mark.parametrize("take", [lambda self, found, *, by=1: LEFT, lambda self, found, *, by=1: 1 / 0])
def test_what_was_put_off_is_done_by_the_original(engine, take, caplog):
    model = engine[0].Model()
    run([pair(take=take)])
    for _ in range(2):
        assert model.walk(model.step(3), by=2) == ("walked", 4, 2)
        assert model.walk(found=model.step(3)) == ("walked", 4, 1)
    assert len(caplog.records) <= 1  # a failure is said once


def test_a_changed_second_function_leaves_both(engine, tmp_path, monkeypatch):
    known = pair()
    changed = module("nosuchengine.kernels", ENGINE.replace('"walked", found', '"walked", 2 * found'), tmp_path)
    monkeypatch.setitem(sys.modules, "nosuchengine.kernels", changed)
    before = changed.Model.step, changed.Model.walk
    assert [o.why for o in run([known])] == ["its source is not that of 1.3.0+cpu"]
    assert before == (changed.Model.step, changed.Model.walk)


def test_a_changed_body_under_the_same_signature_leaves_it(engine, tmp_path, monkeypatch, caplog):
    known = hook(), hook(beside=("nosuchengine.kernels:Base.step",), read={"1.3.0": digests("scale", "Base.step")})
    original = engine[0].scale
    assert [o.why for o in run(known[1:])] == [""]
    engine[0].scale = original
    changed = module("nosuchengine.kernels", ENGINE.replace("x + 1", "x + 2"), tmp_path)
    monkeypatch.setitem(sys.modules, "nosuchengine.kernels", changed)
    original = changed.scale
    with caplog.at_level(logging.INFO):
        assert [o.why for o in run(known[1:])] == ["its source is not that of 1.3.0+cpu"]  # what it works beside
    assert changed.scale is original and "scale: not replaced, its source is not that of 1.3.0+cpu (" in caplog.text
    assert [o.why for o in run(known[:1])] == [""]  # its own is as it was
    for new in ("return x * factor * 1", "return x * factor  # now faster"):
        changed = module("nosuchengine.kernels", ENGINE.replace("return x * factor", new), tmp_path)
        monkeypatch.setitem(sys.modules, "nosuchengine.kernels", changed)
        original = changed.scale
        assert [o.why for o in run(known[:1])] == ["its source is not that of 1.3.0+cpu"]
        assert changed.scale is original and original(2, 3) == 6


def test_what_another_plugin_put_there_is_left(engine):
    kernels, _ = engine
    known = hook()

    @functools.wraps(kernels.scale)  # looks like the original to inspect.getsource
    def theirs(x, factor):
        return 5

    kernels.scale = theirs
    assert run([known])[0].why == "its source is not that of 1.3.0+cpu" and kernels.scale is theirs


def test_sources_are_the_same_by_file_and_by_function(engine, tmp_path):
    file = Path(engine[0].__file__)
    for path in ("scale", "Base.step", "Model.named"):
        text = sources.of_file(file, path)
        assert text == sources.of_function(sources.resolve(f"nosuchengine.kernels:{path}")[2])
        assert text.splitlines()[0].startswith(("def ", "@classmethod"))
    with pytest.raises(OSError, match="no Base.gone in kernels.py"):
        sources.of_file(file, "Base.gone")
    (tmp_path / "nosuchengine").mkdir()
    (tmp_path / "nosuchengine" / "kernels.py").write_text(ENGINE)
    assert sources.of_folder(tmp_path, ["nosuchengine.kernels:scale"]) == digests("scale")


def test_digests_of_a_folder_without_an_engine_are_refused(tmp_path, monkeypatch):
    for given, said in (([str(tmp_path)], str(tmp_path)), ([], "none")):
        monkeypatch.setattr(sys, "argv", ["digests", *given])
        with pytest.raises(SystemExit) as refused:
            digests_command.main()
        assert str(refused.value) == f"digests: the folder must have vllm or sglang in it; got {said}"


def test_sources_of_what_triton_and_torch_were_given(tmp_path):
    """And not of what only looks like torch's."""
    text = ("import functools\nimport torch\nimport triton\n\n\n@triton.jit\ndef kernel(x):\n    pass\n\n\n"
            "@torch.compile(backend='eager')\ndef scale(x):\n    return x\n\n\n"
            "@functools.wraps(scale)\ndef other(x):\n    return 2 * x\n")
    made = module("nosuchengine.kernels", text, tmp_path)
    for name in ("kernel", "scale", "other"):
        text = sources.of_function(getattr(made, name))
        assert text == sources.of_file(Path(made.__file__), name) and f"def {name}(x):" in text


@pytest.mark.parametrize("changes, version, why", [
    ({"target": "nosuchengine.gone:scale"}, "1.3.0", "ModuleNotFoundError: No module named 'nosuchengine.gone'"),
    ({"target": "nosuchengine.kernels:gone"}, "1.3.0", "AttributeError: module 'nosuchengine.kernels' has no attribute "
                                                       "'gone'"),
    ({}, "1.3.1", "version 1.3.1 was not read; 1.3.0 was"),
    ({}, "1.3.0.post1", "version 1.3.0.post1 was not read; 1.3.0 was"),
    ({"read": {"1.1.0": "", "1.2.0": ""}}, "1.3.0", "version 1.3.0 was not read; 1.1.0, 1.2.0 were"),
    ({}, "dev", "version dev was not read; 1.3.0 was"),
    ({"keep": lambda: "no GPU"}, "1.3.0", "no GPU"),
    ({"measured": {"cpu": False}}, "1.3.0", "slower than the engine's own on cpu"),
    ({"prepare": lambda: 1 / 0}, "1.3.0", "ZeroDivisionError: division by zero"),
])
def test_left_in_place(engine, caplog, changes, version, why):
    kernels, worker = engine
    original = kernels.scale
    with caplog.at_level(logging.INFO):
        found = run([hook(**changes) if "target" not in changes else Hook(**vars(hook()) | changes),
                     hook(**STEP, read={version: digests("Base.step")})], version)
    assert found[0].why == why and kernels.scale is worker.scale is original
    assert found[1].why == "" and f"dflash-kernels: scale: not replaced, {why} (" in caplog.text  # others go on


def test_an_import_that_raises(engine, monkeypatch, tmp_path):
    (tmp_path / "explodes.py").write_text("raise OSError('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    assert run([Hook(**vars(hook()) | {"target": "explodes:scale"})])[0].why == "OSError: no such library"


def test_disabled_by_name_and_enabled_by_name(engine, caplog):
    kernels, _ = engine
    step = hook(**STEP, measured={"cpu": False})
    found = run([hook(), step], DISABLE="scale, typo", ENABLE="step")
    assert [o.why for o in found] == ["disabled by DFLASH_FAKE_DISABLE", ""]
    assert kernels.scale(2, 3) == 6 and kernels.Model().step(1) == 20
    assert "DFLASH_FAKE_DISABLE must be names of scale,step; got typo" in caplog.text


def test_nothing_that_was_not_measured_is_on_by_itself(engine, caplog):
    kernels, _ = engine
    original, given = kernels.scale, [hook(), hook(**STEP)]
    with caplog.at_level(logging.INFO):
        assert [o.why for o in run(given, platform="sm_90")] == ["not measured on sm_90 yet"] * 2
    assert kernels.scale is original
    assert caplog.messages == ["dflash-kernels: not replaced, because not measured on sm_90 yet: scale, step; "
                               "enable with DFLASH_FAKE_ENABLE=scale,step"]  # one line for all of them
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert [o.why for o in run(given, platform="sm_90", ENABLE="scale", DISABLE="step")] == [
            "", "disabled by DFLASH_FAKE_DISABLE"]
    assert kernels.scale(2, 3) == -6 and not any("not measured" in line for line in caplog.messages)
    assert run([hook(measured={"sm_90": True})], platform="sm_90")[0].why == ""
    assert run([Hook(**vars(hook(**STEP)) | {"measured": {"sm_90": True}})], platform="sm_100")[0].available


def test_the_platform_is_a_generation(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: {0: (9, 0), 1: (10, 0)}[device.index])
    assert [platform_of(torch.device(d)) for d in ("cuda:0", "cuda:1", "xpu")] == ["sm_90", "sm_100", "xpu"]
    monkeypatch.setattr("torch.version.hip", "7.1")
    assert platform_of(torch.device("cuda:0")) == "rocm"


@pytest.mark.parametrize("isa, name", [("amx", "cpu"), ("avx512_bf16", "cpu"), ("avx2", "cpu_avx2"),
                                       ("generic", "cpu_generic"), ("reference", "cpu_reference")])
def test_a_cpu_is_one_that_was_measured_or_another(monkeypatch, isa, name):
    """Without kernels, or with those of another instruction set, nobody knows what is faster."""
    monkeypatch.setattr(dflash_kernels, "build_info", lambda: {"isa": isa})
    assert platform_of(torch.device("cpu")) == name
