import inspect
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dflash_kernels
from dflash_kernels import _library, reference
from dflash_kernels.limits import FP8
from dflash_kernels.testing import same_bits
from tests.support import ROOT, fresh
from tests.support.op_samples import SAMPLES, RawCalls, tensors_in

PACKAGE = Path(dflash_kernels.__file__).parent
needs_native = pytest.mark.skipif(_library.native is None, reason="the C++ library is not built")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
public = {n: getattr(dflash_kernels, n) for n in dflash_kernels.__all__}
# workspace_size is a number that an op needs, and no op.
functions = [n for n, f in public.items() if f.__module__.startswith("dflash_kernels.ops.") and n != "workspace_size"]


def python(code, cwd=PACKAGE.parent, **env):
    """Runs code in an interpreter that has imported torch, and finds the package in cwd."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DFLASH_")}
    return fresh.run(code, cwd, kept | {"PYTHONPATH": str(cwd)} | env)


# ---- every op ------------------------------------------------------------------------------------------------------
WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
                  "test_aot_dispatch_dynamic")


def raw_calls(sample):
    with RawCalls() as noted:
        sample.function(**sample.arguments())
    return noted.calls


def test_every_op_and_every_public_function_has_a_sample():
    covered = {func._schema.name.split("::")[1] for s in SAMPLES.values() for func, _, _ in raw_calls(s)}
    assert covered == set(_library.NAMES)
    assert {s.function.__name__ for s in SAMPLES.values()} == set(functions)


@pytest.mark.parametrize("name", _library.NAMES)
def test_every_op_has_a_schema_that_writes_a_reference_and_a_fake(name):
    schema = getattr(torch.ops.dflash, name).default._schema
    assert not schema.returns
    assert any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"dflash::{name}", "CompositeExplicitAutograd") and has(f"dflash::{name}", "Meta")
    assert _library.REFERENCES[name].__module__.startswith(reference.__name__)


@needs_native
@pytest.mark.parametrize("name", _library.NAMES)
def test_every_op_has_a_cpu_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dflash::{name}", "CPU")


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.written])
def test_opcheck(name):
    calls = raw_calls(SAMPLES[name])
    assert calls
    for func, args, kwargs in calls:
        # torch multiplies an op's inputs to see which were written, and has no product of fp8.
        fp8 = any(t.dtype == FP8 for t in tensors_in(list(args)))
        torch.library.opcheck(func, args, kwargs, test_utils=WITHOUT_SCHEMA if fp8 else "ALL")


@pytest.mark.parametrize("name", functions)
def test_docstrings_name_errors_graph_safety_and_source(name):
    """What else they have, tests/kernels/test_docstrings.py says."""
    doc = inspect.getdoc(getattr(dflash_kernels, name)) or ""
    assert {"raises", "graph-safe", "source"} <= set(re.findall(r"[a-z-]+", doc.lower())), name


def test_everything_else_public_has_a_docstring():
    others = set(public) - set(functions)
    assert others
    for name in others:
        assert inspect.getdoc(public[name]), name


# ---- torch.compile -------------------------------------------------------------------------------------------------

def block_step(anchors, lens, table, embedding, norm, qkv_weight, cos_sin, cache):
    block = dflash_kernels.prepare_block(anchors, lens, 3, 9, page_table=table, page_size=4, embedding=embedding)
    h = dflash_kernels.rms_norm(block.rows.view(6, 8), norm)
    qkv = dflash_kernels.linear(h, qkv_weight)
    qkv = dflash_kernels.qk_norm_rope(qkv, block.positions.view(-1), cos_sin, num_heads=2, num_kv_heads=1, head_dim=8,
                                      cache=cache, slots=block.slots.view(-1))
    gated = dflash_kernels.silu_and_mul(qkv[:, :16])
    logits = gated.view(2, 3, 8) * 2
    return dflash_kernels.verify_greedy(block.ids, None, lens, logits=logits), qkv


def test_torch_compile_equals_eager():
    anchors, lens = torch.tensor([3, 4]), torch.tensor([5, 2], dtype=torch.int32)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    tensors = (torch.randn(10, 8), torch.randn(8), torch.randn(32, 8), torch.randn(12, 8))
    results = []
    for function in (block_step, torch.compile(block_step, backend="aot_eager", fullgraph=True)):
        cache = dflash_kernels.PagedKV(*(torch.zeros(4, 4, 1, 8) for _ in range(2)))
        found, qkv = function(anchors, lens, table, *tensors, cache)
        results.append([*tensors_in(found), qkv, cache.k, cache.v])
    assert results[0][-1].any()
    for eager, compiled in zip(*results, strict=True):
        assert same_bits(eager, compiled)


def test_torch_compile_takes_outputs_of_any_number_of_rows():
    def step(x, residual, weight):
        return dflash_kernels.add_rms_norm(x, residual, weight, out=x)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x, residual, weight = torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(8)
        expected = step(x.clone(), residual.clone(), weight)
        for eager, found in zip(expected, compiled(x, residual, weight), strict=True):
            assert same_bits(eager, found)


# ---- importing -----------------------------------------------------------------------------------------------------

def test_importing_prints_nothing_loads_nothing_else_and_touches_no_gpu():
    ran = python("import sys, torch\nbefore = {m.split('.')[0] for m in sys.modules}\nimport dflash_kernels\n"
                 "new = {m.split('.')[0] for m in sys.modules} - before - set(sys.stdlib_module_names)\n"
                 "assert new == {'dflash_kernels'}, new\n"
                 "assert not {'triton', 'transformers'} & set(sys.modules)\nassert not torch.cuda.is_initialized()")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "" and ran.stderr == ""


@needs_native
def test_dflash_isa_chooses_the_instruction_set():
    for isa in _library.native.isas()[:2]:
        ran = python("from dflash_kernels._library import native; print(native.isa())", DFLASH_ISA=isa)
        assert ran.stdout.strip() == isa, ran.stderr


@needs_native
def test_an_instruction_set_that_the_cpu_has_not_is_refused():
    names = ("generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
    there, now = _library.native.isas(), _library.native.isa()
    assert there == [name for name in names if name in there] and now in there
    for name in (*names, "sse9", ""):
        if name in there:
            _library.native.set_isa(name)
            assert _library.native.isa() == name
            _library.native.set_isa(now)
        else:
            with pytest.raises(ValueError, match=f"one of {', '.join(there)}, which this CPU has; got {name}"):
                _library.native.set_isa(name)


@needs_native
@pytest.mark.parametrize("bad", ["sse9", "AVX2"])
def test_a_bad_dflash_isa_is_an_error_that_the_user_sees(bad):
    ran = python("import dflash_kernels", DFLASH_ISA=bad)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert re.search(rf"ImportError: dflash_kernels: .*DFLASH_ISA must be one of .*; got {bad}$", last), ran.stderr


def copy_of_the_package(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "dflash_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_a_library_that_does_not_load_is_an_error_that_the_user_sees(tmp_path):
    (copy_of_the_package(tmp_path) / "dflash_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    ran = python("import dflash_kernels", cwd=tmp_path)
    assert ran.returncode == 1 and "ImportError: dflash_kernels: the C++ library is built but does not" in ran.stderr


def test_without_the_library_every_op_answers_and_one_warning_says_why(tmp_path):
    shutil.copy(ROOT / "tests" / "support" / "op_samples.py", copy_of_the_package(tmp_path))
    # An editable installation would find the library where it was built.
    ran = python("import sys\nsys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
                 "import warnings, torch\nwarnings.simplefilter('always')\nimport dflash_kernels, op_samples\n"
                 f"assert dflash_kernels.__file__.startswith({str(tmp_path)!r})\n"
                 "assert dflash_kernels._library.native is None\n"
                 "with warnings.catch_warnings(record=True) as caught:\n"
                 "    warnings.simplefilter('always')\n"
                 "    for sample in op_samples.SAMPLES.values():\n"
                 "        for _ in range(2): sample.function(**sample.arguments())\n"
                 "    x = torch.randn(3, 256, requires_grad=True)\n"
                 "    w = torch.randn(5, 256)\n"
                 "    with torch.autocast('cpu', torch.bfloat16): y = dflash_kernels.linear(x, w)\n"
                 "    torch.testing.assert_close(y, torch.nn.functional.linear(x, w).detach())\n"
                 "    assert not y.requires_grad\n"
                 "for w in caught: print(w.category.__name__, w.message)", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.strip().splitlines()
    assert len(lines) == 1, lines
    assert re.match(r"UserWarning dflash_kernels runs its float32 reference, .* has no C\+\+ kernels .* install g\+\+",
                    lines[0])


# ---- the binary ----------------------------------------------------------------------------------------------------

PYTHON_LIMITED_API = {
    "PyArg_ParseTuple", "PyBool_FromLong", "PyCapsule_GetPointer", "PyCapsule_IsValid", "PyCapsule_New",
    "PyErr_Fetch", "PyErr_Format", "PyErr_NoMemory", "PyErr_Occurred", "PyErr_Restore", "PyErr_SetString",
    "PyEval_RestoreThread", "PyEval_SaveThread", "PyExc_ImportError", "PyExc_RuntimeError", "PyExc_TypeError",
    "PyExc_ValueError", "PyImport_GetModule", "PyList_Append", "PyList_New", "PyList_SetItem", "PyLong_AsLong",
    "PyLong_AsLongLong", "PyLong_AsSsize_t", "PyLong_FromLong", "PyLong_FromLongLong", "PyLong_FromSize_t",
    "PyLong_FromUnsignedLongLong", "PyModule_AddObject", "PyModule_Create2", "PyObject_CallMethod",
    "PyObject_SetAttrString", "PyTuple_New", "PyTuple_SetItem", "PyType_FromSpec", "PyType_GenericAlloc",
    "PyType_GetSlot", "PyUnicode_FromString", "Py_BuildValue", "Py_DecRef", "Py_IncRef", "_Py_Dealloc",
    "_Py_FalseStruct", "_Py_NoneStruct", "_Py_TrueStruct",
}
# The C shims of torch's stable ABI; anything of at::, c10:: or torch:: changes from one torch to the next.
TORCH_STABLE = re.compile(r"^(aoti_torch_\w+|torch_\w+)$")
SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
LINKER = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}


def symbols(path, *options):
    """(type, name) of each symbol."""
    out = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return [tuple(line.split()[-2:]) for line in out.splitlines() if len(line.split()) >= 2]


def test_the_sources_use_no_macro_that_torch_2_11_has_not():
    """STABLE_TORCH_ERROR_CODE_CHECK came after it. What else is newer, TORCH_TARGET_VERSION hides."""
    assert not [f for f in ROOT.glob("csrc/**/*.*") if "STABLE_TORCH_ERROR" in f.read_text()]


@needs_native
@needs_nm
def test_the_library_needs_stable_symbols_only():
    names = [n for _, n in symbols(_library.native.__file__, "-D", "--undefined-only")]
    if any("__asan" in n or "__ubsan" in n for n in names):
        pytest.skip("a sanitized library")
    strange = [n for n in names if not (n in PYTHON_LIMITED_API or n in LINKER or TORCH_STABLE.match(n)
                                        or SYSTEM.search(n))]
    assert not strange, strange
    assert any(TORCH_STABLE.match(n) for n in names)


@needs_native
@needs_nm
def test_the_library_offers_its_module_and_no_function_of_an_instruction_set():
    offered = [n for _, n in symbols(_library.native.__file__, "-D", "--defined-only", "-C")]
    assert "PyInit__C" in offered
    assert not [n for n in offered if re.search(r"dflash::(generic|avx|amx)", n)]


@needs_nm
def test_no_instruction_set_s_object_defines_a_symbol_that_the_linker_may_merge():
    """A weak function compiled with AVX-512 could be the copy that the plain x86-64 path ends up calling."""
    objects = sorted(ROOT.glob("build/temp.*/cpu.*.o"))
    if not objects:
        pytest.skip("no object files in build/")
    for path in objects:
        bad = [(kind, n) for kind, n in symbols(path, "--defined-only") if kind in "WVuwv"]
        assert not bad, f"{path.name}: {bad}"
