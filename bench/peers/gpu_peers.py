"""The GPU peers of an op: libraries, and the engines' own Triton kernels, loaded without the engines.

    python -m bench.peers.gpu_peers WHEEL ...     copies the needed files out of wheels of sglang and vllm

A peer is a function registered with @peer(op, name). It takes a benchmark's problem and returns call(i), which does the
op's work on copy i of the inputs. Results are tensors in the order of our own result, or a function that returns them
afterwards. A peer that is unavailable raises Absent with the reason.

The engines' files are in DFLASH_PEER_KERNELS, or else in build/peers/kernels, in their package's folders. A file is
imported under its module name in the engine. Modules of the engine that are not there become empty stand-ins.
"""

import importlib.abc
import importlib.util
import os
import sys
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from bench import ROOT

FILES = {
    "sglang": ["kernels/ops/speculative/dflash.py", "kernels/ops/speculative/fused_kv_materialize.py",
               "kernels/ops/speculative/reject_sampling.py",
               # tests/triton/test_triton_engines*.py take functions out of these
               "srt/plugins/hook_registry.py", "srt/speculative/dflash_worker_v2.py", "srt/speculative/dflash_utils.py",
               "srt/mem_cache/memory_pool.py", "srt/models/dflash.py",
               # its kernel registry: tests/engines/test_engines_registry.py
               "kernels/spec.py", "kernels/registry.py", "kernels/selector.py", "kernels/ops/speculative/__init__.py",
               "kernels/plugin_kernels/nvidia/spec.py"],
    "vllm": ["v1/worker/gpu/spec_decode/dflash/speculator.py", "v1/worker/gpu/spec_decode/rejection_sampler_utils.py",
             "v1/worker/gpu/cp_utils.py", "v1/worker/gpu/sample/gumbel.py", "v1/worker/gpu/sample/watermark.py",
             "v1/spec_decode/fly.py", "v1/watermarking/prfs/philox.py",
             "v1/attention/ops/triton_reshape_and_cache_flash.py",
             # DFlash2's, of which tests/triton/test_triton_dflash2.py has more
             "model_executor/models/qwen3_dflash2.py", "v1/worker/gpu/spec_decode/dflash2/speculator.py",
             "models/beam/nvidia/dflash2_conv_ops.py", "models/beam/nvidia/dflash2_ops.py",
             "models/beam/nvidia/dflash2_context_ops.py",
             # its IR: tests/engines/test_engines_ir.py
             "ir/op.py", "ir/ops/layernorm.py", "ir/tolerances.py", "ir/util.py"],
}
MAKERS: dict[str, dict[str, Callable]] = {}


class Absent(Exception):
    """The reason that a peer is unavailable, in one line."""


def folder() -> Path:
    return Path(os.environ.get("DFLASH_PEER_KERNELS") or ROOT / "build/peers/kernels")


def peer(op: str, name: str) -> Callable:
    def register(make: Callable) -> Callable:
        MAKERS.setdefault(op, {})[name] = make
        return make

    return register


class _Nothing:
    """A name of the engine that is imported but not used by the functions called here."""

    def __init__(self, *_args, **_kwargs):
        pass


class _StandIn(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


def _values(module: str) -> dict:
    """The values that the files import from missing modules."""
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    return {
        "vllm.triton_utils": {"triton": triton, "tl": tl, "tldevice": libdevice, "HAS_TRITON": True},
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(
            **dict.fromkeys(("debug", "info", "warning", "warning_once"), lambda *words: None))},
        "vllm.config.compilation": {"CUDAGraphMode": SimpleNamespace(NONE=None)},
        "vllm.compilation.decorators": {"support_torch_compile": lambda cls: cls},
        "vllm.v1.attention.backends.utils": {"PAD_SLOT_ID": -1},
        "vllm.v1.kv_cache_interface": {"is_quantized_kv_cache": lambda dtype: dtype.startswith("fp8")},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_rocm=lambda: False, is_xpu=lambda: False,
                                                               has_device_capability=lambda number: True,
                                                               fp8_dtype=lambda: torch.float8_e4m3fn)},
        "vllm.model_executor.layers.quantization.utils.quant_utils": {
            "FP8_DTYPE": torch.float8_e4m3fn, "get_fp8_min_max": lambda: (-448.0, 448.0)},
    }.get(module, {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, engine: str):
        self.engine = engine

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] != self.engine:
            return None
        file = folder().joinpath(*fullname.split(".")).with_suffix(".py")
        if file.exists():
            return importlib.util.spec_from_file_location(fullname, file)
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        vars(module).update(_values(module.__name__))


@contextmanager
def _only_here(engine: str):
    """Uses only the engine modules of the folder; an installed engine is restored afterwards."""
    of_engine = lambda: [n for n in sys.modules if n.split(".")[0] == engine]  # noqa: E731
    before, finder = {n: sys.modules.pop(n) for n in of_engine()}, _Finder(engine)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in of_engine():
            del sys.modules[name]
        sys.modules.update(before)


@cache
def load(engine: str, path: str) -> ModuleType:
    """One of FILES as a module. Raises Absent."""
    if not (folder() / engine / path).exists():
        raise Absent(f"{engine}/{path} is not in {folder().name}: make peer-kernels")
    with _only_here(engine):
        return importlib.import_module(".".join((engine, *Path(path).with_suffix("").parts)))


def unpack(wheels: list[Path]) -> None:
    """Copies FILES out of wheels, and records the wheel's name as the measured version."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            engine = wheel.name.split("-")[0]
            for path in FILES[engine]:
                target = folder() / engine / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(f"{engine}/{path}"))
            (folder() / engine / "VERSION").write_text(wheel.name.split("-")[1])


def versions() -> dict[str, str]:
    files = {engine: folder() / engine / "VERSION" for engine in FILES}
    return {engine: file.read_text().strip() for engine, file in files.items() if file.exists()}


if __name__ == "__main__":
    unpack([Path(word) for word in sys.argv[1:]])
