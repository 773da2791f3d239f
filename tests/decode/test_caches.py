"""Where compiled kernels and converted models are kept: folders that many processes fill at once, or that cannot be
written."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from tests.support.cli_calls import environment

# One process imports triton, and eight of its children load one of our launchers, which prepares the cache, at the same
# moment, and then compile the same kernel at the same moment.
EIGHT = """
import hashlib, json, multiprocessing, os
import dflash_kernels._triton as ours
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, at < n) * 2.0 + 1.0, at < n)

def compiled(start):
    start.wait()
    ours.load(ours.LAUNCHERS["rms_norm"])
    prepared = os.path.isdir(os.environ["TRITON_CACHE_DIR"])  # before anything is compiled
    start.wait()
    source = ASTSource(kernel, {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 64})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return {kind: hashlib.sha256(code if isinstance(code, bytes) else str(code).encode()).hexdigest()
            for kind, code in made.asm.items() if kind in ("ttir", "ptx", "cubin")} | {"prepared": prepared}

def work(start, answers):
    answers.put(compiled(start))

context = multiprocessing.get_context("fork")
start, answers = context.Barrier(8), context.Queue()
children = [context.Process(target=work, args=(start, answers)) for _ in range(8)]
[child.start() for child in children]
found = [answers.get() for _ in children]
[child.join() for child in children]
print(json.dumps({"codes": [child.exitcode for child in children], "found": found,
                  "again": compiled(context.Barrier(1))}))
"""


@pytest.mark.slow
def test_eight_processes_fill_an_empty_cache_at_once(tmp_path):
    """One entry is left, nobody sees half a file, and all have the same kernel. The cache is prepared as for a launch;
    the launch itself needs a GPU, so the kernel that is compiled is the test's."""
    pytest.importorskip("triton")
    (tmp_path / "kernel.py").write_text(EIGHT)  # triton reads a kernel's source from its file
    done = subprocess.run([sys.executable, tmp_path / "kernel.py"], capture_output=True, text=True,
                          env=environment(TRITON_CACHE_DIR=str(tmp_path / "cache")))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["codes"] == [0] * 8 and len(said["found"]) == 8
    assert said["again"].keys() == {"ttir", "ptx", "cubin", "prepared"}
    assert all(found == said["again"] and found["prepared"] for found in said["found"])
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert sum(file.suffix == ".cubin" for file in files) == 1, files
    assert [file for file in (tmp_path / "cache").rglob("tmp.*")] == []
    assert all(file.stat().st_size for file in files if file.name != "lock")


@pytest.fixture
def no_folder(tmp_path):
    """Nobody, root included, can make a folder in it."""
    (tmp_path / "file").touch()
    return tmp_path / "file"


@pytest.fixture
def prepare(monkeypatch):
    """prepare(): the warnings that it gives, and where kernels are kept then."""
    knobs = pytest.importorskip("triton").knobs
    from dflash_kernels._triton import _cache

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)

    def run(home=None):
        with warnings.catch_warnings(record=True) as told, knobs.cache.scope():
            warnings.simplefilter("always")
            if home is not None:
                knobs.cache.home_dir = str(home)
            _cache.prepare.cache_clear()
            _cache.prepare()
            _cache.prepare()
            return [str(warning.message) for warning in told], knobs.cache.dir

    yield run
    _cache.prepare.cache_clear()


def test_a_home_that_cannot_be_written_gets_one_warning_and_a_folder_for_the_process(prepare, no_folder):
    (told,), where = prepare(no_folder)
    assert told.startswith(f"dflash_kernels: Triton cannot keep compiled kernels in {no_folder}/.triton/cache: Not a d")
    assert "set TRITON_CACHE_DIR" in told and not where.startswith(str(no_folder)) and os.access(where, os.W_OK)


def test_a_chosen_cache_that_cannot_be_written_is_refused(prepare, no_folder, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(no_folder / "cache"))
    with pytest.raises(RuntimeError, match="TRITON_CACHE_DIR must be a directory that can be .*file/cache': Not a dir"):
        prepare()


def test_a_cache_that_can_be_written_is_left_alone(prepare, tmp_path, monkeypatch):
    assert prepare(tmp_path) == ([], str(tmp_path / ".triton" / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new"))
    assert prepare() == ([], str(tmp_path / "new")) and list((tmp_path / "new").iterdir()) == []


def test_a_filled_cache_that_can_only_be_read_is_used(prepare, tmp_path, monkeypatch):
    """An image may bring its kernels."""
    from dflash_kernels._triton import _cache

    (tmp_path / "kernel").touch()
    monkeypatch.setattr(_cache, "_unwritable", lambda where: "Read-only file system")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert prepare() == ([], str(tmp_path))


@pytest.mark.slow
def test_a_model_is_loaded_beside_a_home_that_cannot_be_written(tmp_path, no_folder):
    """A converted GGUF file is kept for the next start: without that it is only slower."""
    pytest.importorskip("gguf")
    from tests.decode.test_weights import write_gguf

    write_gguf(tmp_path / "m.gguf")
    chosen = ("TRITON_CACHE_DIR", "TRITON_HOME", "DFLASH_CACHE", "XDG_CACHE_HOME")
    bare = {name: value for name, value in environment(HOME=str(no_folder)).items() if name not in chosen}
    words = ["--model", str(tmp_path / "m.gguf"), "--drafter", "none", "--prompt", "ab", "--max-tokens", "3"]
    done = subprocess.run([sys.executable, "-m", "dflash_decode.cli", "generate", *words], capture_output=True,
                          text=True, env=bare)
    assert done.returncode == 0 and "tokens: 3" in done.stdout and done.stderr.count("\n") <= 1, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["file", "m.gguf"]
