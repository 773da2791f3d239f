"""Prints the digests of every hook's functions from an engine's files, without importing them.

    python -m dflash_engines.digests FOLDER

FOLDER is where the engine is installed (site-packages), or its unpacked wheel. Each line ends with the digest for a
hook's `read`, to be entered once the functions have been read.
"""

import sys
from pathlib import Path

from . import sglang, vllm
from .sources import of_folder


def main() -> None:
    folder = Path(sys.argv[1])
    for engine, hooks in (("vllm", vllm.hooks()), ("sglang", sglang.hooks())):
        for hook in hooks if (folder / engine).is_dir() else ():
            print(f"{engine} {hook.name}: {of_folder(folder, hook.sources)}")


if __name__ == "__main__":
    main()
