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
    folder, engines = " ".join(sys.argv[1:]) or "none", {"vllm": vllm.hooks(), "sglang": sglang.hooks()}
    found = [engine for engine in engines if (Path(folder) / engine).is_dir()]
    if not found:
        sys.exit(f"digests: the folder must have {' or '.join(engines)} in it; got {folder}")
    for engine in found:
        for hook in engines[engine]:
            print(f"{engine} {hook.name}: {of_folder(Path(folder), hook.sources)}")


if __name__ == "__main__":
    main()
