"""Enters our ops into the kernel registry of SGLang's wheel, as its plugin loader would, and calls them through it.

    python -m bench.engines.sglang_registry

`make engine-sglang` installs the wheel. Only the package's own __init__ is left out, which imports the server.
"""

import importlib
import logging
import os
import sys
import types

import torch

from bench import ROOT

PEER = ROOT / "build" / "peers" / "sglang"


def engine() -> types.ModuleType:
    """`sglang.kernels`, filled with all that SGLang has."""
    folders = list(PEER.glob("lib/python*/site-packages"))
    if not any((folder / "sglang").is_dir() for folder in folders):
        sys.exit(f"engine-sglang: SGLang's wheel must be in {PEER.relative_to(ROOT)}; got nothing: make engine-sglang")
    sys.path += map(str, folders)
    package = types.ModuleType("sglang")
    package.__path__ = [str(folder / "sglang") for folder in folders]
    sys.modules["sglang"] = package
    return importlib.import_module("sglang.kernels")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    os.environ["DFLASH_SGLANG_ENABLE"] = "shared_ops"
    kernels = engine()
    contract = importlib.import_module("sglang.kernels.plugin_kernels.nvidia.spec")
    before = len(kernels.registry.all_specs())
    from dflash_engines import sglang as plugin
    from dflash_engines.sglang import registry

    print(f"SGLang {importlib.import_module('sglang.version').__version__}: {before} entries, plugin API "
          f"{contract.MEGAKERNEL_API_VERSION}")
    plugin.register()
    print(f"with ours: {len(kernels.registry.all_specs())} entries")
    plugin_backend = kernels.KernelBackend.PLUGIN
    for declared in registry.declarations(kernels, contract):
        numerics = declared.numerics.kind.value
        function = kernels.get_kernel(declared.spec.op, plugin_backend)
        print(f"  {declared.spec.op:52} {numerics:10} {function.__module__}")
    print("features:", ", ".join(sorted(feature.value for feature in declared.features)))
    ids = torch.tensor([[5, 7, 8, 9]]), torch.tensor([[7, 8, 3, 4]])
    accept = kernels.get_kernel(registry.SHARED[0], plugin_backend)(candidates=ids[0], target_predict=ids[1])
    print("accepted drafts and bonus by the registry:", *(t.tolist() for t in accept))
    x = torch.randn(3, 64).bfloat16()
    native, ours = (kernels.get_kernel(registry.SHARED[1], backend)(x)
                    for backend in (kernels.KernelBackend.TORCH, plugin_backend))
    print(f"silu_and_mul beside SGLang's in torch: at most {float((native - ours).abs().max()):.2g} apart")


if __name__ == "__main__":
    main()
