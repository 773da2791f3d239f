"""The same prompts and the same drafter through other people's loops and ours, greedy, one request at a time.

    python bench/peers/run.py --prompts FILE... [--draft DIR] [--limit N] [--only ours,dflash,vllm,llama] [--json OUT]

Each peer runs in a process and an environment of its own, never two at once, in turn for each task and in the opposite
order for the next one. Loading and a warm-up are not timed. `make peers` installs the environments.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from export import export
from job import DFLASH, PLAIN, Job
from rich.console import Console
from rich.table import Table
from sums import Sums, rows

from dflash_decode.bench import read_prompts
from dflash_decode.results import commit, cpu_model, write_json
from dflash_decode.tokenizer import load_tokenizer
from dflash_decode.weights import find_model, read_json

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / "build" / "peers"
OUT = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Peer:
    """own: it has an environment of its own. reads: the form of the target that it loads."""

    name: str
    reads: str
    own: bool = False
    modes: tuple[str, ...] = (PLAIN, DFLASH)
    also_one_thread: bool = False

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.name / "bin" / "python" if self.own else Path(sys.executable)


PEERS = (Peer("ours", "model"), Peer("dflash", "folder"), Peer("vllm", "folder", own=True),
         Peer("llama", "gguf", own=True, modes=(PLAIN,), also_one_thread=True))


@dataclass(frozen=True)
class Turn:
    """One run of a peer in one mode."""

    peer: Peer
    mode: str
    threads: int

    def __str__(self):
        return f"{self.peer.name}, {self.mode}, {self.threads} thread{'s' * (self.threads > 1)}"


def turns(only: list[str], threads: int, drafting: bool) -> list[Turn]:
    made = []
    for peer in PEERS:
        if peer.name in only:
            counts = (1, threads) if peer.also_one_thread and threads > 1 else (threads,)
            made += [Turn(peer, mode, n) for n in counts for mode in peer.modes if drafting or mode == PLAIN]
    return made


def environment(turn: Turn) -> dict[str, str]:
    """What the caller has set goes before what we would set, but for the number of threads."""
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if turn.peer.name == "vllm":
        # By itself vLLM keeps a core for its scheduler, which waits busily: of two cores one would compute. In one
        # process, with Intel's OpenMP, which it warns to be much slower without, and that OpenMP's settings as it
        # makes them for its workers.
        found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "KMP_BLOCKTIME": "5",
                  "KMP_TPAUSE": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                  "VLLM_CACHE_ROOT": str(ENVIRONMENTS / "vllm" / "cache")}
        openmp = ENVIRONMENTS / "vllm" / "lib" / "libiomp5.so"
        found |= {"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}
    found |= os.environ | {"OMP_NUM_THREADS": str(turn.threads)}
    if turn.peer.own:
        found.pop("PYTHONPATH", None)  # it is that of our environment
    return found


def ask(turn: Turn, job: Job, log: Path, timeout: float) -> dict:
    """The peer's reply; RuntimeError with the reason where there is none."""
    if not job.model:
        raise RuntimeError(f"the model must be there as a {turn.peer.reads} file; it is not")
    if not turn.peer.python.is_file():
        raise RuntimeError(f"not installed: {last_line(ENVIRONMENTS / (turn.peer.name + '.log')) or 'make peers does'}")
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        question, reply = Path(folder) / "job.json", Path(folder) / "reply.json"
        question.write_text(json.dumps(asdict(job)), encoding="utf-8")
        command = [turn.peer.python, HERE / f"peer_{turn.peer.name}.py", question, reply]
        try:
            done = subprocess.run(command, env=environment(turn), stdout=output, stderr=output, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {timeout:.0f} s; see build/peers/{log.name}") from None
        if done.returncode or not reply.is_file():
            raise RuntimeError(f"{last_line(log) or f'exit code {done.returncode}'}; see build/peers/{log.name}")
        return json.loads(reply.read_text(encoding="utf-8"))


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    # An exception's line says more than what is printed while everything is torn down after it.
    errors = [line for line in lines if "Error" in line.split(":", 1)[0] or line.startswith("ERROR")]
    return (errors or [line for line in lines if line.strip()] or [""])[-1].strip()[:300]


def read_tasks(files: list[Path], limit: int | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in files:
        for prompt in read_prompts(file, limit):
            found.setdefault(prompt.task, []).append(prompt.text)
    return found


def forms(model: str, needed: set[str]) -> dict[str, str]:
    """What each kind of reader is given for the model."""
    where, found = find_model(model), {"model": model}
    if where.suffix == ".gguf":
        found["gguf"] = str(where)
        if "folder" in needed:
            folder = ENVIRONMENTS / "models" / where.stem
            found["folder"] = str(folder if (folder / "config.json").is_file() else export(model, folder))
    else:
        found["folder"] = str(where)
    return found


def command(options: argparse.Namespace) -> str:
    """What repeats it, without the folders of this machine."""
    draft = ["--draft", Path(options.draft).name] if options.draft else []
    limit = ["--limit", str(options.limit)] if options.limit else []
    return shlex.join(["python", "bench/peers/run.py", "--prompts", *(f.name for f in options.prompts), *draft, *limit,
                       "--max-new-tokens", str(options.max_new_tokens), "--threads", str(options.threads)])


def measure(options: argparse.Namespace) -> dict:
    tokenizer, tasks = load_tokenizer(options.model), read_tasks(options.prompts, options.limit)
    order = turns(options.only, options.threads, options.draft is not None)
    models = forms(options.model, {turn.peer.reads for turn in order})
    block = read_json(Path(options.draft) / "config.json") if options.draft else {}
    nested = block.get("dflash_config") or {}
    block_size = options.block_size or nested.get("block_size") or block.get("block_size", 1)
    header = {"kind": "peers", "model": options.model, "draft": options.draft and Path(options.draft).name,
              "block_size": block_size, "max_new_tokens": options.max_new_tokens, "limit": options.limit,
              "concurrency": 1, "cpu": cpu_model(), "threads": options.threads, "commit": commit(), "versions": {},
              "command": command(options)}
    found, missing = [], {}
    result = {"header": header, "rows": [], "missing": missing}
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    for number, (task, texts) in enumerate(tasks.items()):
        prompts = [tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": text}]))
                   for text in texts]
        for turn in order if number % 2 == 0 else order[::-1]:
            if str(turn) in missing:
                continue
            job = Job(turn.mode, models.get(turn.peer.reads, ""), options.draft if turn.mode == DFLASH else None,
                      block_size, options.max_new_tokens, turn.threads, list(tokenizer.stop_ids), prompts)
            try:
                reply = ask(turn, job, ENVIRONMENTS / f"last-{turn.peer.name}-{turn.mode}.log", options.timeout)
            except RuntimeError as error:
                missing[str(turn)] = said = str(error)
            else:
                header["versions"][turn.peer.name] = reply["versions"]
                found.append(Sums.of(turn.peer.name, turn.mode, turn.threads, task, reply))
                result["rows"], said = rows(found), f"{found[-1].row()['tokens_per_s']} tokens/s"
            OUT.print(f"{task}: {turn}: {said}", markup=False)
            if options.json:
                write_json(options.json, result)
    return result


def show(result: dict) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("task", "peer", "mode", "threads", "prompts", "tokens", "acceptance", "tokens/s", "decoding only",
                   "same as our plain"):
        table.add_column(column, justify="left" if column in ("task", "peer", "mode") else "right")
    for r in result["rows"]:
        same = "" if r["same_as_our_plain"] is None else f"{r['same_as_our_plain']} of {r['prompts']}"
        table.add_row(r["task"], r["peer"], r["mode"], str(r["threads"]), str(r["prompts"]), str(r["tokens"]),
                      f"{r['acceptance_length']:.2f}", *("" if r[rate] is None else f"{r[rate]:.1f}" for rate in
                                                        ("tokens_per_s", "decode_tokens_per_s")), same)
    OUT.print(table)
    for who, why in result["missing"].items():
        OUT.print(f"missing: {who}: {why}", markup=False)


def main() -> None:
    names = [peer.name for peer in PEERS]

    def chosen(text):
        unknown = set(text.split(",")) - set(names)
        if unknown:
            raise argparse.ArgumentTypeError(f"must be of {','.join(names)}; got {','.join(sorted(unknown))}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help='JSON lines: {"task", "id", "turns"}')
    parser.add_argument("--draft", help="a drafter's directory; plain decoding only if not given")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int, help="the first N prompts of each file")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--block-size", type=int, help="the drafter's if not given")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=chosen, default=names, metavar="NAME,...", help=f"of {','.join(names)}")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one peer, mode and task")
    parser.add_argument("--json", type=Path, help="written after every run, so that an interrupted one keeps its rows")
    options = parser.parse_args()
    result = measure(options)
    show(result)
    sys.exit(0 if result["rows"] else 1)


if __name__ == "__main__":
    main()
