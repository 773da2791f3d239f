"""Writes the library as two kernels for the Hugging Face hub, in the layout of kernel-builder, and builds them here.

    python -m tools.hub [OUT] [--no-build]

dflash-kernels has the Triton kernels, for GPUs, as Python alone (torch-noarch). dflash-kernels-cpu has the C++ kernels,
for x86-64, against torch's stable ABI. Both are folders that kernel-builder takes. What it would build for this machine
is put into their `build` folders, where the package `kernels` finds it: get_local_kernel(OUT / "dflash-kernels-cpu").
"""

import argparse
import shutil
from pathlib import Path

from bench import ROOT

from . import source, variant


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.hub", description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "build" / "hub")
    parser.add_argument("--no-build", action="store_true", help="the sources alone")
    options = parser.parse_args()
    for kernel in source.KERNELS:
        folder = options.out / kernel.name
        shutil.rmtree(folder, ignore_errors=True)
        source.write(kernel, folder)
        built = "" if options.no_build else variant.build(kernel, folder).relative_to(folder).as_posix()
        files = [file for file in folder.rglob("*") if file.is_file()]
        print(f"{folder}: {len(files)} files, {kernel.framework}{built and f', {built}'}")


if __name__ == "__main__":
    main()
