"""What the tests of the command line share beside conftest's fixtures."""

import json
import os
import signal
import sys


def one_line(err):
    return err.startswith("dflash-kernels: ") and err.count("\n") == 1 and "Traceback" not in err


def heed_interrupts():
    """Before a program that is to be interrupted: what runs in the background ignores that, and so would its child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def prompts_file(tmp_path, *tasks, turns=("hello",)):
    file = tmp_path / "prompts.jsonl"
    rows = [{"task": t, "id": f"{t}/{i}", "turns": [f"{turns[0]} {i}", "not used"]} for t in tasks for i in range(3)]
    file.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    return file


def environment(**more):
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more
