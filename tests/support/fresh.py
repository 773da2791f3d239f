"""Runs code in an interpreter that has imported torch and nothing else: forked from one that waits, because importing
torch takes longer than most of what is run."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import json, os, sys, traceback, torch

def run(code, cwd, env, out, err):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[1:1] = env.get("PYTHONPATH", "").split(os.pathsep)
    for fd, name in (0, os.devnull), (1, out), (2, err):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), fd)
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    if not (child := os.fork()):
        status = 1
        try:
            status = run(**json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=env)


def run(code: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """What `python -c code` would: its exit status, standard output and standard error. An exception, SystemExit too,
    gives status 1."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        server = _server()
        print(json.dumps({"code": code, "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}),
              file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())
