"""SGLang's kernel registry and its contract for plugins: the real files of its wheel, or a stand-in of their shape.

Their structures are msgspec's, of which `Struct` has what they use."""

import dataclasses
import enum
import functools
import importlib
import sys
import types

from tests.support.engine_files import source

KERNELS, CONTRACT = "sglang.kernels", "sglang.kernels.plugin_kernels.nvidia.spec"
REAL = ("kernels/spec.py", "kernels/registry.py", "kernels/selector.py", "kernels/plugin_kernels/nvidia/spec.py")


class Struct:
    def __init_subclass__(cls, frozen=False):
        for name in vars(cls).get("__annotations__", {}):
            value = vars(cls).get(name)
            if isinstance(value, dict | list):  # msgspec copies such defaults
                setattr(cls, name, dataclasses.field(default_factory=functools.partial(type(value), value)))
        dataclasses.dataclass(frozen=frozen)(cls)
        cls.__struct_fields__ = tuple(field.name for field in dataclasses.fields(cls))


def _package(monkeypatch, name):
    module = types.ModuleType(name)
    module.__path__ = []
    monkeypatch.setitem(sys.modules, name, module)
    return module


def real(monkeypatch):
    """(sglang.kernels, the contract): the registry as SGLang fills it for speculative decoding."""
    paths = {path: source("sglang", path) for path in (*REAL, "kernels/ops/speculative/__init__.py")}
    monkeypatch.setitem(sys.modules, "msgspec", types.SimpleNamespace(Struct=Struct))
    for name in ("sglang", KERNELS, f"{KERNELS}.ops", f"{KERNELS}.plugin_kernels", f"{KERNELS}.plugin_kernels.nvidia"):
        package = _package(monkeypatch, name)
        package.__path__ = [str(paths["kernels/spec.py"].parents[1].joinpath(*name.split(".")[1:]))]
    for name in (*(f"{KERNELS}.{part}" for part in ("spec", "registry", "selector", "ops.speculative")), CONTRACT):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    kernels = sys.modules[KERNELS]
    for part in ("spec", "registry", "selector"):
        vars(kernels).update({name: value for name, value in vars(sys.modules[f"{KERNELS}.{part}"]).items()
                              if not name.startswith("_")})
    return kernels, sys.modules[CONTRACT]


def stand_in(monkeypatch):
    """The same in shape: what a plugin registers and reads, without what SGLang does with it."""
    for name in ("sglang", KERNELS):
        _package(monkeypatch, name)
    kernels, contract = sys.modules[KERNELS], types.SimpleNamespace(MEGAKERNEL_API_VERSION=1)

    class CapabilityRequirement(Struct, frozen=True):
        device: object
        min_cuda_arch: object = None

        @classmethod
        def cuda(cls, min_sm=None):
            return cls("cuda", min_sm)

    class KernelSpec(Struct, frozen=True):
        op: str
        backend: object
        target: str
        capabilities: frozenset = frozenset()

        def load(self):
            module, _, name = self.target.partition(":")
            return getattr(importlib.import_module(module), name)

    found = {}

    def register_kernel(spec):
        assert found.setdefault((spec.op, spec.backend), spec) == spec

    backend = enum.Enum("KernelBackend", {"PLUGIN": "plugin", "TRITON": "triton"})
    vars(kernels).update(
        KernelBackend=backend, KernelSpec=KernelSpec, DeviceType=enum.Enum("DeviceType", {"CPU": "cpu"}),
        CapabilityRequirement=CapabilityRequirement, register_kernel=register_kernel,
        get_kernel=lambda op, chosen: found[op, chosen].load(),
        registry=types.SimpleNamespace(all_specs=lambda: list(found.values())))

    class Requirements(Struct, frozen=True):
        isas: frozenset
        tp_sizes: frozenset
        dtypes: frozenset = frozenset()

    class Numerics(Struct, frozen=True):
        kind: object
        tolerances: object

    contract.Requirements, contract.Numerics = Requirements, Numerics
    contract.Feature = enum.Enum("Feature", "SPECULATIVE_DECODING DETERMINISTIC_INFERENCE")
    contract.NumericsKind = enum.Enum("NumericsKind", "BITWISE TOLERANCE")
    return kernels, contract


def installed(monkeypatch, which, version="0.5.23"):
    found = {"real": real, "stand-in": stand_in}[which](monkeypatch)
    told = types.ModuleType("sglang.version")
    told.__version__ = version
    monkeypatch.setitem(sys.modules, "sglang.version", told)
    sys.modules["sglang"].version = told
    return found
