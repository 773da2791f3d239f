"""Writes triton.md, triton.json and loops.md: python -m tools.aot FOLDER [CACHE]"""

import sys
from pathlib import Path

from . import loops
from .compile import keys, read, report_all, write

if __name__ == "__main__":
    folder, *cache = sys.argv[1:]
    before = Path(folder, "triton.json")
    every = report_all(*cache, known=read(before)[1] if before.exists() else None)
    write(every, folder, keys())
    Path(folder, "loops.md").write_text(loops.table())
    sys.exit("\n".join(filter(None, (r.complaint() for r in every))) or 0)
