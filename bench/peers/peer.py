"""A peer as the driver sees it: a process in its own environment that answers until it is closed."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import ROOT
from bench.peers.job import BASELINE, DFLASH, Job, Question, Reply

ENVIRONMENTS = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Peer:
    """A peer.

    own: whether it is installed apart, with a Python of its own or as a program.
    reads: the form of the models that it loads.
    also_one_thread: whether baseline decoding also runs on one thread, which need not be slower with 4-bit weights.
    batches: whether it answers concurrent requests.
    script: of peer_<script>.py, and the folder where it is installed; empty for the name.
    weights: how our loop keeps the model's weights.
    """

    name: str
    reads: str
    own: bool = False
    modes: tuple[str, ...] = (BASELINE, DFLASH)
    also_one_thread: bool = False
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    batches: bool = False
    script: str = ""
    weights: str = "model"

    @property
    def python(self) -> Path:
        own = self.home / "bin" / "python"
        return own if own.exists() else Path(sys.executable)

    @property
    def home(self) -> Path:
        return ENVIRONMENTS / (self.script or self.name)


PEERS = (Peer("ours", "model", batches=True),
         Peer("ours8", "model", dtypes=("bfloat16",), batches=True, script="ours", weights="int8"),
         Peer("oursfile", "model", dtypes=("bfloat16",), batches=True, script="ours", weights="file"),
         Peer("dflash", "folder", modes=(DFLASH,)),
         Peer("transformers", "folder", modes=(BASELINE,)), Peer("vllm", "folder", own=True, batches=True),
         Peer("llama", "gguf", own=True, also_one_thread=True, dtypes=("bfloat16",)),
         Peer("llama8", "gguf8", own=True, dtypes=("bfloat16",), script="llama"))


@dataclass(frozen=True)
class Turn:
    """A peer in one mode."""

    peer: Peer
    mode: str
    threads: int

    def __str__(self):
        return f"{self.peer.name}, {self.mode}, {self.threads} thread{'s' * (self.threads > 1)}"


def turns(only: list[str], threads: int, drafting: bool) -> list[Turn]:
    made = []
    for peer in PEERS:
        if peer.name in only:
            if peer.also_one_thread and threads > 1:
                made.append(Turn(peer, BASELINE, 1))
            made += [Turn(peer, mode, threads) for mode in peer.modes if drafting or mode == BASELINE]
    return made


def environment(turn: Turn) -> dict[str, str]:
    """The environment of a peer. The caller's variables take precedence over ours, except the number of threads."""
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if turn.peer.name == "vllm":
        # By itself vLLM keeps a core for its scheduler, which waits busily: of two cores one would compute. In one
        # process, with Intel's OpenMP, which it warns to be much slower without, and that OpenMP's settings as it
        # makes them for its workers. No plugin: ours may be installed beside it.
        found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "KMP_BLOCKTIME": "5",
                  "KMP_TPAUSE": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_PLUGINS": "",
                  "VLLM_CACHE_ROOT": str(ENVIRONMENTS / "vllm" / "cache")}
        openmp = ENVIRONMENTS / "vllm" / "lib" / "libiomp5.so"
        found |= {"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}
    found |= os.environ | {"OMP_NUM_THREADS": str(turn.threads)}
    if turn.peer.own:
        found.pop("PYTHONPATH", None)  # it is that of our environment
    return found


class Running:
    """A loaded peer. Every failure is a RuntimeError with the reason, and ends the process."""

    def __init__(self, turn: Turn, job: Job, timeout: float):
        if job.dtype not in turn.peer.dtypes:
            raise RuntimeError(f"it does not run in {job.dtype}")
        if not job.model:
            raise RuntimeError(f"the model must be there as a {turn.peer.reads} file; it is not")
        home = turn.peer.home
        if turn.peer.own and not (home / "installed").is_file():
            raise RuntimeError(f"not installed: {last_line(home.with_name(home.name + '.log')) or 'make peers does'}")
        self.log, self.timeout = ENVIRONMENTS / f"last-{turn.peer.name}-{turn.mode}-{turn.threads}.log", timeout
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout)
        module = f"bench.peers.peer_{turn.peer.script or turn.peer.name}"
        command = [turn.peer.python, "-m", module, str(theirs.fileno())]
        with self.log.open("wb") as output, theirs:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(turn), stdin=subprocess.DEVNULL,
                                            stdout=output, stderr=output, pass_fds=[theirs.fileno()])
        self._end, self._lines = ours, ours.makefile("rw", encoding="utf-8")
        self.versions = self._say(job)

    def ask(self, question: Question) -> Reply:
        return Reply(**self._say(question))

    def _say(self, value) -> dict:
        try:
            self._lines.write(json.dumps(asdict(value)) + "\n")
            self._lines.flush()
            line = self._lines.readline()
        except TimeoutError:
            self.close()
            raise RuntimeError(f"no answer in {self.timeout:.0f} s; see build/peers/{self.log.name}") from None
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        code = self.close()
        raise RuntimeError(f"{last_line(self.log) or f'exit code {code}'}; see build/peers/{self.log.name}")

    def close(self) -> int:
        """The exit code. A peer exits when its end of the socket closes; otherwise it is ended."""
        with contextlib.suppress(OSError):  # it has gone already
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    # An exception's line says more than what is printed while everything is torn down after it.
    errors = [line for line in lines if "Error" in line.split(":", 1)[0] or line.startswith("ERROR")]
    return (errors or [line for line in lines if line.strip()] or [""])[-1].strip()[:300]
