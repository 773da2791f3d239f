import gc
import os
import subprocess
import sys
from pathlib import Path

# A worker of pytest-xdist shares the cores with the others: two threads of a kernel would wait for each other. Read
# when torch is imported, and by the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from dflash_kernels.testing import every_isa, use_isa
from tests.support import sampling_distribution as sampling_distribution
from tools.dry_gpu import interpreter

# Triton decides when it is first imported whether kernels are interpreted, so the tests that interpret them run in a
# process of their own: test_triton.py starts it, or `TRITON_INTERPRET=1 pytest tests/triton/test_triton_norm.py`.
_triton_tests = {f"triton/{p.name}" for p in Path(__file__).parent.glob("triton/test_triton*.py")}
_compiled = {"triton/test_triton.py", "triton/test_triton_aot.py"}
TOLD, INTERPRETED = pytest.StashKey[list[str]](), pytest.StashKey[list[tuple[int, int]]]()
collect_ignore = sorted(_compiled if os.environ.get("TRITON_INTERPRET") == "1" else _triton_tests - _compiled)
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.prepare()


X86_ISAS = ("avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
# Sets by what has code of its own there: blocks of 4 to 8 bits, dot products of bf16, everything.
BYTE_ISAS = every_isa()
ISAS = [isa for isa in BYTE_ISAS if not isa.endswith("_vnni")]
VECTOR_ISAS = [isa for isa in ISAS if isa not in ("avx512_bf16", "amx")]


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per instruction set of this machine."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture(params=BYTE_ISAS)
def byte_isa(request):
    """As isa, for products of weights in blocks, which two sets have code for alone."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture(params=VECTOR_ISAS)
def vector_isa(request):
    """As isa, for kernels that have no code of their own for the bf16 dot products of the higher sets."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a tiny target and a drafter for it, by what the command line calls them."""
    from tests.support import tiny

    folder = tmp_path_factory.mktemp("models")
    return {"model": str(tiny.write_target(folder / "target")), "draft": str(tiny.write_drafter(folder / "draft"))}


@pytest.fixture
def call(capfd):
    """Runs the command in this process: (exit code, standard output, standard error)."""
    from dflash_decode.cli import app as cli

    threads = torch.get_num_threads()

    def run(*arguments):
        code = cli.run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def by_threads():
    """by_threads(call): what it gives with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()

    def run(call):
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(call())
        return found

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def tell(request):
    """tell(line): shown below the tests' dots, whatever is captured."""
    return request.config.stash.setdefault(TOLD, []).append


@pytest.fixture
def interpreted(request):
    """interpreted((ran, skipped)): more tests in Triton's interpreter."""
    return request.config.stash.setdefault(INTERPRETED, []).append


# Of the repeats for instruction sets and dtypes, what `make test-fast` leaves out.
_REPEATS = {"isa": ISAS[:-1], "byte_isa": BYTE_ISAS[:-1], "vector_isa": VECTOR_ISAS[:-1],
            "dtype": [torch.float32, torch.float16]}


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true",
                     help="the best instruction set and bfloat16 alone, and no test that is marked slow")


def is_fast(item):
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return not item.get_closest_marker("slow") and not any(given.get(n) in left for n, left in _REPEATS.items())


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays until the end: the garbage collector need not look through it each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    """Interpreted kernels first: each of those tests takes up to a minute, and the last to end would end alone."""
    if config.getoption("fast"):
        config.hook.pytest_deselected(items=[item for item in items if not is_fast(item)])
        items[:] = filter(is_fast, items)
    items.sort(key=lambda item: item.path.name != "test_triton.py")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs a test marked alone, unless nothing else was asked for, in a process without other tests, what they left and
    the thread in which pytest-xdist hands a worker its next tests: what is alive there is the test's own."""
    if not pyfuncitem.get_closest_marker("alone") or len(pyfuncitem.session.items) == 1:
        return None
    ran = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--color=no",
                          pyfuncitem.nodeid], cwd=pyfuncitem.config.rootpath, capture_output=True, text=True)
    if ran.returncode or "1 passed" not in ran.stdout:
        pytest.fail(ran.stdout + ran.stderr, pytrace=False)
    return True


def pytest_sessionfinish(session):
    """A worker hands what its tests told to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        stash = session.config.stash
        session.config.workeroutput |= {"told": stash.get(TOLD, []), "interpreted": stash.get(INTERPRETED, []),
                                        "p_values": sampling_distribution.SEEN, "notes": sampling_distribution.NOTES}


class _Workers:
    def pytest_testnodedown(self, node, error):
        output, stash = getattr(node, "workeroutput", {}), node.config.stash
        stash.setdefault(TOLD, []).extend(output.get("told", []))
        stash.setdefault(INTERPRETED, []).extend(output.get("interpreted", []))
        sampling_distribution.SEEN += output.get("p_values", [])
        sampling_distribution.NOTES += output.get("notes", [])


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by --fast")
    config.addinivalue_line("markers", "alone: runs in a process of its own")
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Workers())


def pytest_terminal_summary(terminalreporter):
    stash = terminalreporter.config.stash
    for line in (*stash.get(TOLD, []), *sampling_distribution.summary()):
        terminalreporter.write_line(line)
    if counts := stash.get(INTERPRETED, []):
        ran, skipped = map(sum, zip(*counts, strict=True))
        terminalreporter.write_line(f"{ran} tests in Triton's interpreter, {skipped} skipped")
    if missing := [isa for isa in X86_ISAS if isa not in BYTE_ISAS]:
        terminalreporter.write_line(f"not run, as this machine lacks them: {', '.join(missing)}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
