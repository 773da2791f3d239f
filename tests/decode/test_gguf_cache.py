"""The cache of converted GGUF files: full disks, entries that are not whole, killed processes, several at once."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

from safetensors import SafetensorError

from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.checkpoint.gguf import cache as gguf_cache
from dflash_decode.checkpoint.gguf import file as gguf_file
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from tests.support import ROOT
from tests.support.gguf_files import write_gguf

FILES = ["config.json", "converted-from", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DFLASH_CACHE", str(folder))
    return folder


def entries():
    return {f for f in gguf_cache.cache_dir().iterdir() if f.name != ".lock"}


def model(tmp_path, **changes):
    write_gguf(tmp_path / "m.gguf", tokenizer__chat_template="{{ bos_token }}", **changes)
    return tmp_path / "m.gguf"


def child(code, *arguments):
    """A Python of its own with the tests' helpers; (exit status, standard output, standard error)."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python")))
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


def test_cache_is_used_and_follows_the_file(tmp_path, monkeypatch):
    file = model(tmp_path)
    first = load_checkpoint(file)
    kept = gguf_cache.cached(file)
    assert sorted(f.name for f in kept.iterdir()) == FILES
    with monkeypatch.context() as patched:
        patched.setattr(gguf_file, "open_file", lambda path: pytest.fail("the cache was not used"))
        second = load_checkpoint(file)
    assert second.config == first.config and second.source == first.source == str(file)
    assert all(torch.equal(t, first.tensors[n]) for n, t in second.tensors.items())
    model(tmp_path, arch="qwen3")
    assert load_checkpoint(file).config["model_type"] == "qwen3"


def test_cache_keeps_nothing_of_files_that_are_gone_or_changed(tmp_path):
    files = {name: tmp_path / f"{name}.gguf" for name in ("gone", "changed", "stays", "linked")}
    files["linked"].symlink_to(files["stays"])
    for name in ("gone", "changed", "stays"):
        write_gguf(files[name])
        load_checkpoint(files[name])
    old = {name: gguf_cache.cached(file) for name, file in files.items()}
    assert all(old.values()) and old["linked"] == old["stays"]
    files["gone"].unlink()
    write_gguf(files["changed"], "qwen3")
    (gguf_cache.cache_dir() / "other").mkdir()
    former = gguf_cache.cache_dir() / "stays-0123456789abcdef"
    former.mkdir()
    (former / "converted-from").write_text(str(files["stays"]))
    load_checkpoint(files["changed"])
    assert entries() == {old["stays"], gguf_cache.cached(files["changed"]), gguf_cache.cache_dir() / "other"}
    load_checkpoint(files["linked"])
    assert old["stays"].is_dir()


def test_a_long_name_and_one_that_is_no_text_are_kept_too(tmp_path):
    name = os.fsdecode(b"\xff" + b"n" * 240 + b".gguf")
    write_gguf(tmp_path / name)
    load_checkpoint(tmp_path / name)
    assert gguf_cache.cached(tmp_path / name)


def no_space(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_weights(*_args, **_options):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("step", ["mkdir", "lock", "mkdtemp", "save_file", "rename", 0, 1, 2, 3])
def test_a_disk_that_is_full_at_any_step_is_a_slower_start_and_one_warning(tmp_path, monkeypatch, step):
    file, written = model(tmp_path), []

    def write_text(path, *args, _write=Path.write_text, **options):
        written.append(path)
        return no_space() if len(written) == step + 1 else _write(path, *args, **options)

    with monkeypatch.context() as patched, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        owner, name = {"mkdir": (Path, "mkdir"), "lock": (fcntl, "flock"), "mkdtemp": (gguf_cache.tempfile, "mkdtemp"),
                       "save_file": (gguf_cache, "save_file"), "rename": (os, "rename")}.get(step, (Path, "write_text"))
        patched.setattr(owner, name, {"save_file": no_space_for_weights}.get(step, no_space) if isinstance(step, str)
                        else write_text)
        found = load_checkpoint(file)
    assert [str(w.message) for w in caught] == [str(caught[0].message)] and "No space left" in str(caught[0].message)
    assert "m.gguf: the next start converts this file again" in str(caught[0].message)
    assert gguf_cache.cached(file) is None and entries() == set()
    again = load_checkpoint(file)
    assert gguf_cache.cached(file) and set(again.tensors) == set(found.tensors)
    assert all(torch.equal(t, again.tensors[n]) for n, t in found.tensors.items())


def test_a_user_without_a_home_has_a_slower_start(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    for chosen in ("", "~no-such-user/cache"):
        monkeypatch.setenv("DFLASH_CACHE", chosen)
        with pytest.warns(UserWarning, match="cannot be cached: there is no home directory, and DFLASH_CACHE names"):
            assert load_checkpoint(model(tmp_path)).tensors
        assert gguf_cache.cached(tmp_path / "m.gguf") is None and load_tokenizer(tmp_path / "m.gguf").stop_ids == (0,)


@pytest.mark.slow
def test_a_full_disk_under_the_real_writer(tmp_path, own_cache):
    """RLIMIT_FSIZE: the weights of this model are longer than a file may be."""
    file = model(tmp_path)
    code, out, err = child("""if True:
        import resource, sys
        from dflash_decode.checkpoint import load_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        print(len(load_checkpoint(sys.argv[1]).tensors))
    """, file)
    assert (code, out.strip()) == (0, str(len(load_checkpoint(file, torch.float32).tensors))), err
    assert err.count("the next start converts this file again") == 1 and "Traceback" not in err
    assert "<string>:5: UserWarning" in err and "warn" not in err.replace("UserWarning", "")  # not our line
    assert entries() == set()


def damage(file, how):
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "half": content[:len(content) // 2],
                          "other": content[:-1] + bytes([content[-1] ^ 1])}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "half", "other"])
@pytest.mark.parametrize("name", FILES)
def test_an_entry_that_is_not_whole_is_made_again(tmp_path, name, how):
    file = model(tmp_path)
    first = load_checkpoint(file)
    kept = gguf_cache.cached(file)
    good, template = {f.name: f.read_bytes() for f in kept.iterdir()}, load_tokenizer(file).chat_template
    damage(kept / name, how)
    assert gguf_cache.cached(file) is None
    assert load_tokenizer(file).chat_template == template == "{{ bos_token }}"
    found = load_checkpoint(file)
    assert gguf_cache.cached(file) == kept and {f.name: f.read_bytes() for f in kept.iterdir()} == good
    assert all(torch.equal(t, first.tensors[n]) for n, t in found.tensors.items())


def test_cache_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_cache, "save_file", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(model(tmp_path))
    assert entries() == set()


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed(tmp_path):
    file = model(tmp_path)
    code, _, err = child("""if True:
        import os, signal, sys
        from dflash_decode.checkpoint.gguf import cache as gguf_cache
        from dflash_decode.checkpoint import load_checkpoint
        write = gguf_cache.save_file
        gguf_cache.save_file = lambda *a: (write(*a), os.kill(os.getpid(), signal.SIGKILL))
        load_checkpoint(sys.argv[1])
    """, file)
    assert code == -signal.SIGKILL, err
    assert [f.name[:5] for f in entries()] == [".new-"] and gguf_cache.cached(file) is None
    load_checkpoint(file)
    assert entries() == {gguf_cache.cached(file)}


def test_what_a_live_process_writes_is_left_alone(tmp_path, own_cache):
    file, theirs = model(tmp_path), own_cache / ".new-theirs"
    theirs.mkdir()
    with open(own_cache / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_checkpoint(file).tensors
        assert entries() == {theirs}
    load_checkpoint(file)
    assert entries() == {gguf_cache.cached(file)}


@pytest.mark.slow
def test_six_processes_converting_the_same_gguf_file_at_once(tmp_path):
    file = model(tmp_path)
    code, out, err = child("""if True:
        import hashlib, os, sys, torch
        from dflash_decode.checkpoint.gguf import file as gguf_file
        from dflash_decode.checkpoint.tokenizer import load_tokenizer
        from dflash_decode.checkpoint import load_checkpoint
        import gguf, jinja2, safetensors.torch
        torch.set_num_threads(1)
        waiting, start = os.pipe()
        children = []
        for i in range(6):
            if not (pid := os.fork()):
                os.close(start)
                os.read(waiting, 1)  # returns when the parent has closed its end: all start at once
                digest = hashlib.sha256()
                for _ in range(3):
                    found = load_checkpoint(sys.argv[1])
                    digest.update(repr(sorted(found.config.items())).encode())
                    for name, t in sorted(found.tensors.items()):
                        digest.update(name.encode() + t.view(torch.int16).numpy().tobytes())
                    digest.update(load_tokenizer(sys.argv[1]).backend.to_str().encode())
                os.write(1, digest.hexdigest().encode() + b"\\n")
                os._exit(0)
            children.append(pid)
        os.close(start)
        sys.exit(sum(os.waitpid(pid, 0)[1] for pid in children))
    """, file)
    lines = out.split()
    assert code == 0 and "Traceback" not in err and len(lines) == 6 and len(set(lines)) == 1, err
    assert entries() == {gguf_cache.cached(file)}
    kept = load_checkpoint(file)
    fresh = load_checkpoint(file, torch.float32)
    assert all(torch.equal(t, fresh.tensors[n].bfloat16()) for n, t in kept.tensors.items())
