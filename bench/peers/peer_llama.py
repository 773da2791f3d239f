"""llama.cpp's own server, built for this machine, on the unchanged 4-bit GGUF file, one request at a time.

With a drafter it uses its own DFlash.
"""

import atexit
import ctypes
import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from bench import ROOT
from bench.peers.job import DFLASH, Job, Question, Reply, serve

HOME = ROOT / "build" / "peers" / "llama"
SERVER = HOME / "build" / "bin" / "llama-server"
WHOLE = "it tells the time of an answer only, of which a step is the mean"
PR_SET_PDEATHSIG = 1


def load(job: Job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base, log = f"http://127.0.0.1:{port}", HOME / f"server-{port}.log"
    with log.open("wb") as output:
        server = subprocess.Popen([SERVER, *map(str, options(job, port))], stdin=subprocess.DEVNULL, stdout=output,
                                  stderr=output, preexec_fn=end_with_the_peer)
    atexit.register(server.kill)
    while not ready(base):
        if server.poll() is not None:
            raise RuntimeError(f"llama-server ended with {server.returncode}; see {log}")
        time.sleep(0.1)
    said = log.read_text(encoding="utf-8", errors="replace")

    def answering(asked: Question) -> Reply:
        began, counts, steps, parts = time.perf_counter(), [], [], []
        for prompt in asked.prompts:
            found = post(f"{base}/completion", {"prompt": prompt, "n_predict": asked.max_tokens, "temperature": 0.0,
                                                "cache_prompt": False})
            counts.append(found["tokens_predicted"])
            # It tells no steps: each gives one token more than it accepts, and the first token is the prompt's.
            timings = found["timings"]
            steps.append(counts[-1] - 1 - timings.get("draft_n_accepted", 0))
            if steps[-1]:  # its clock for new tokens starts where the prompt's first one is there
                parts += [{"step": timings["predicted_ms"] / 1e3 / steps[-1]}] * steps[-1]
        return Reply(time.perf_counter() - began, counts, steps=steps if job.mode == DFLASH else [],
                     **({"parts": parts, "whole": WHOLE} if asked.watched else {}))

    return answering, versions(said), None


def options(job: Job, port: int) -> list:
    found = ["--model", job.model, "--ctx-size", job.longest + job.block_size, "--parallel", 1, "--threads",
             job.threads, "--threads-batch", job.threads, "--host", "127.0.0.1", "--port", port, "--offline"]
    if job.mode == DFLASH:
        found += ["--model-draft", job.draft, "--spec-type", "draft-dflash", "--spec-draft-n-max", job.block_size - 1,
                  "--spec-draft-threads", job.threads, "--spec-draft-threads-batch", job.threads]
    return found


def end_with_the_peer() -> None:
    """Ties the server to this process, because a killed peer cannot end its server. It may not heed other signals."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ready(base: str) -> bool:
    try:
        return urllib.request.urlopen(f"{base}/health", timeout=5).status == 200
    except OSError:
        return False


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise ValueError(f"llama.cpp refuses: {error.read().decode(errors='replace')}") from None


def versions(log: str) -> dict[str, str]:
    """The release of the sources, and the server's build target."""
    source = next(HOME.glob("source/*.tar.gz"), Path("unknown"))
    info = re.search(r"system_info:.*?\| *(.*)", log)
    return {"llama.cpp of": source.name.removesuffix(".tar.gz"), "llama.cpp": info[1].strip(" |") if info else ""}


if __name__ == "__main__":
    serve(load)
