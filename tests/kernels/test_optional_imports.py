"""What a GPU alone needs, Triton and the CUDA C++ library, may be missing or broken in any way: importing goes on, one
warning says why, CPU ops work, and nobody is told that a step can be captured."""

import re
import sys

import pytest
import torch

import dflash_kernels as dk
from dflash_kernels import _gpu, _triton
from tests.kernels.test_registry import copy_of_the_package, python

pytestmark = pytest.mark.slow
BROKEN = {"RuntimeError: no driver": "raise RuntimeError('no driver')", "SyntaxError: invalid": "raise 1 2",
          "SystemExit: 3": "raise SystemExit(3)", "AttributeError: module 'triton' has no attribute 'jit'": ""}

# A torch that says it has CUDA, the launchers that it would be given, and tensors that say they are there.
SAY = """
import sys, types, warnings, torch
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(f)]  # it would find what is built
torch.version.cuda = "1.0"
{before}
import dflash_kernels as dk
from dflash_kernels import _gpu, _library, _triton

assert "triton.language" not in sys.modules
x, w = torch.randn(3, 16), torch.randn(16)
want = dk.rms_norm(x, w)
torch.testing.assert_close(want, torch.nn.functional.rms_norm(x, (16,), w, 1e-6))

class OnCuda(torch.Tensor):
    device = property(lambda self: torch.device("cuda", 0))
    get_device = lambda self: 0

torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
torch.cuda.is_current_stream_capturing = lambda: False
print(dk.StepGraph.available("cuda"), _gpu.problem(), sep=";")
try:
    with dk.StepGraph("cuda").capture():
        print("captured")
except RuntimeError as error:
    print(error)
launchers = {{}}
if _triton.installed:
    _triton.install(types.SimpleNamespace(impl=lambda op, f, key: launchers.__setitem__(op, f)), _library.FALLBACKS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out = torch.empty(3, 16)
            launchers["rms_norm"](*(t.as_subclass(OnCuda) for t in (x, w)), 1e-6, out)
            torch.testing.assert_close(out, want)
    print(*(str(c.message) for c in caught), sep=";")
"""


def said(home, before="", first=""):
    ran = python(SAY.format(before=before), cwd=home, PYTHONPATH=f"{first}:{home}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("Warning: ") == 1, ran.stderr  # of the C++ library, which is not in a copy
    return ran.stdout.strip().splitlines()


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_triton_first_on_the_path_stops_nobody_from_importing(what, tmp_path):
    first = tmp_path / "first" / "triton"
    first.mkdir(parents=True)
    (first / "__init__.py").write_text(BROKEN[what])
    (first / "language.py").touch()
    available, refused, *warned = said(copy_of_the_package(tmp_path / "home"), first=first.parent)
    problem = available.removeprefix("False;triton, which the GPU kernels are written in, does not load: ")
    assert problem.startswith(what) and refused.startswith("StepGraph: ")
    assert len(warned) == 1 and re.match("dflash_kernels runs its float32 reference, which is correct and slow: .*"
                                         + re.escape(problem), warned[0])


def test_a_triton_without_a_spec_stops_nobody_from_importing(tmp_path):
    """As a stand-in is that another package puts there."""
    lines = said(copy_of_the_package(tmp_path), 'sys.modules["triton"] = types.ModuleType("triton")')
    assert lines[0].startswith("False;triton, which the GPU kernels are written in, does not load: ")
    assert len(lines) == 3


def test_an_interrupt_while_triton_is_imported_is_nobodys_problem(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(_triton.importlib, "import_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _triton.problem.__wrapped__()


def test_a_step_can_be_captured_only_where_ops_have_kernels(monkeypatch):
    """ROCm's torch calls its devices cuda as well; a torch with CUDA may be without Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_triton, "installed", False)
    assert not dk.StepGraph.available("cuda") and "for CUDA alone" in _gpu.problem()
    monkeypatch.setattr(torch.version, "cuda", "1.0")
    monkeypatch.setattr(_triton, "problem", _triton.problem.__wrapped__)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "triton", None)
        without.delitem(sys.modules, "triton.language", raising=False)
        assert not _triton.found() and not dk.StepGraph.available("cuda")
        assert _gpu.problem().endswith("is missing; pip install triton")
    monkeypatch.setattr(_triton, "problem", lambda: None)
    assert dk.StepGraph.available("cuda") and not dk.StepGraph.available("meta")


def test_a_cuda_library_that_does_not_load_stops_nobody_from_importing(tmp_path):
    """It is not missed, as Triton has all of its kernels; one that another CUDA was linked to raises."""
    home = copy_of_the_package(tmp_path)
    (home / "dflash_kernels" / "_cuda.py").write_text("raise OSError('libcudart.so.11.0: cannot open')")
    ran = python("import torch\ntorch.version.cuda = '1.0'\nimport dflash_kernels as dk\n"
                 "print(dk.build_info()['cuda_kernels'])\n"
                 "print(torch._C._dispatch_has_kernel_for_dispatch_key('dflash::write_context_kv', 'CUDA'))", cwd=home)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["built, not loaded: libcudart.so.11.0: cannot open", "True"]
    warned = re.findall(r"UserWarning: (.*)", ran.stderr)
    assert len(warned) == 1 and "CUDA C++ library is built but does not load: libcudart.so.11.0" in warned[0]


@pytest.mark.parametrize("version, said, why", [
    ("2.10.0", "built for another machine", ""),
    ("2.9.1+cu128", "undefined symbol: torch_library_impl", "It is for torch 2.10 or newer; this is torch 2.9.1+cu128"),
    ("2.14.1+debian", "libtorch_cpu.so: cannot open shared object file",
     "It is linked to PyPI's torch; torch 2.14.1+debian has its libraries under other names"),
])
def test_a_cpu_library_that_raises_anything_is_an_error_that_the_user_sees(tmp_path, version, said, why):
    home = copy_of_the_package(tmp_path)
    (home / "dflash_kernels" / "_C.py").write_text(f"raise ImportError({said!r})")
    ran = python(f"import torch\ntorch.__version__ = torch.torch_version.TorchVersion({version!r})\n"
                 "import dflash_kernels", cwd=home)
    assert ran.returncode == 1 and ran.stderr.strip().splitlines()[-1] == (
        f"ImportError: dflash_kernels: the C++ library is built but does not load: {said}{why and f'. {why}'}")
