"""Runs a script or a module on the stand-in: python -m tools.dry_gpu SCRIPT | -m MODULE [WORD ...]"""

import sys

from .gpu import main

main(sys.argv[1:])
