"""The library of CUDA C++ kernels: what it is compiled to, what it needs of torch, and when it is loaded."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from dflash_kernels import _gpu, build_info
from setup import CUDA_ARCHITECTURES, ROOT, find_cutlass, find_nvcc
from tests.kernels.test_registry import LINKER, PYTHON_LIMITED_API, SYSTEM, TORCH_STABLE, needs_nm, symbols
from tools.aot import ptxas

BUILT = importlib.util.find_spec("dflash_kernels._cuda")
needs_nvcc = pytest.mark.skipif(not find_nvcc(), reason="there is no nvcc")
needs_library = pytest.mark.skipif(not BUILT, reason="the CUDA C++ library is not built")


# ---- what ptxas says -----------------------------------------------------------------------------------------------

@pytest.mark.slow
@needs_nvcc
@pytest.mark.timeout(1200)
def test_kernels_compile_for_every_architecture_without_spills(capsys, tell):
    reports = ptxas.report_all(ptxas.kernels())
    with capsys.disabled():
        print("\n" + ptxas.table(reports))
    tell(ptxas.summary(reports))
    wrong = [r.complaint() for r in reports if r.complaint()]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(not find_cutlass(), reason="the package nvidia-cutlass is not installed")
@pytest.mark.timeout(1200)
def test_cute_compiles_for_the_oldest_and_the_newest_architecture():
    reports = ptxas.report_all([ptxas.PROBE], architectures=(CUDA_ARCHITECTURES[0], CUDA_ARCHITECTURES[-1]))
    assert {r.arch for r in reports} == {80, 120} and not any(r.complaint() for r in reports)


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstPf
    0 bytes stack frame, {} bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_80'
ptxas info    : Function properties for _Z6secondPf
    {} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_spills_and_stack_are_read_and_are_complaints():
    first, second = ptxas.parse(LOG.format(4, 16), 80)
    assert first[:6] == ("first", 80, 32, 4, 0, 512) and second[:6] == ("second", 80, 8, 0, 16, 0)
    assert "4 bytes spilled" in first.complaint() and "16 bytes of stack" in second.complaint()
    assert not any(r.complaint() for r in ptxas.parse(LOG.format(0, 0), 80))
    with pytest.raises(RuntimeError, match="ptxas gave unexpected output"):
        ptxas.parse(LOG.replace("Used", "Took"), 80)


# ---- the binary ----------------------------------------------------------------------------------------------------

@needs_library
@needs_nm
def test_the_library_needs_stable_symbols_only():
    names = [n for _, n in symbols(BUILT.origin, "-D", "--undefined-only")]
    strange = [n for n in names if not (n in PYTHON_LIMITED_API or n in LINKER or TORCH_STABLE.match(n)
                                        or SYSTEM.search(n))]
    assert not strange, strange
    assert "aoti_torch_get_current_cuda_stream" in names


@needs_library
@needs_nm
def test_the_library_offers_its_module_and_nothing_of_cuda_s_runtime():
    offered = [n for _, n in symbols(BUILT.origin, "-D", "--defined-only", "-C")]
    assert "PyInit__cuda" in offered
    assert not [n for n in offered if re.search(r"^_*cuda[A-Z]|dflash::cuda", n)]


# ---- when it is loaded ---------------------------------------------------------------------------------------------

@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_does_not_load_it():
    assert "dflash_kernels._cuda" not in sys.modules
    assert build_info()["cuda_kernels"] == "built, not loaded: this torch has no CUDA"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("dflash::write_context_kv", "CUDA")


def test_every_choice_says_where_it_was_measured():
    assert all(road in ("triton", "cuda") and where for road, where in _gpu.CHOICE.values())


SAY = """
import sys, torch
sys.path.insert(0, "dflash_kernels")
import _cuda
torch.version.cuda = _cuda.build_info()["cuda"]
{before}
import dflash_kernels
from dflash_kernels import _gpu, _library
dump = torch._C._dispatch_dump("dflash::write_context_kv")
answers = [line for line in dump.splitlines() if line.startswith("CUDA:")]
print(sorted(_gpu.CHOICE) == sorted(_library.cuda.ops()), hasattr(torch.ops.dflash_cuda, "write_context_kv"),
      "cuda" if any("bindings/cuda" in a for a in answers) else "triton" if answers else "reference",
      dflash_kernels.build_info()["cuda_kernels"], sep="; ")
"""


def said(tmp_path, before=""):
    """What the package says in a torch with CUDA. A torch without gets the one function of the library's that it lacks,
    and is told that it has CUDA: enough to load and to register, not to launch."""
    environment = {}
    if torch.version.cuda is None:
        source, stand_in = tmp_path / "stream.c", tmp_path / "stream.so"
        source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
        subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(stand_in)], check=True)
        environment["LD_PRELOAD"] = str(stand_in)
    ran = subprocess.run([sys.executable, "-c", SAY.format(before=before)], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip().split("; ")


@needs_library
def test_with_cuda_it_is_loaded_and_the_table_chooses(tmp_path):
    pytest.importorskip("triton")
    complete, callable_alone, answer, built = said(tmp_path)
    assert (complete, callable_alone, answer) == ("True", "True", _gpu.CHOICE["write_context_kv"][0])
    assert re.match(r"CUDA \d+\.\d+: sm_80 sm_90a sm_100a sm_120a$", built)


@needs_library
def test_without_triton_it_answers_what_it_can(tmp_path):
    assert said(tmp_path, 'sys.modules["triton"] = None')[2] == "cuda"


@needs_library
def test_beside_a_torch_of_another_cuda_it_answers_nothing(tmp_path):
    _, callable_alone, answer, built = said(tmp_path, 'torch.version.cuda = "1.0"')
    assert (callable_alone, answer) == ("False", "triton")
    assert re.match(r"built with CUDA \d+\.\d+, not used: this torch has CUDA 1\.0$", built)
