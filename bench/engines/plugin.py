"""Compares vLLM with and without our plugin on the same prompts (drafts, K/V, times), and serves it to real clients.

    python -m bench.engines [--only serve|trace|alone] [--rounds N] [--compile] [--json OUT]

`make engine-vllm` builds the environment, and the wheel that is added to it.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console

from bench import ROOT
from bench.case import results_folder
from bench.peers.export import export
from bench.servers import free_port, wait
from dflash_bench.results import commit, output, write_json
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from dflash_kernels import build_info

PEERS = ROOT / "build" / "peers"
PYTHON, OVERLAY = PEERS / "vllm" / "bin" / "python", ROOT / "build" / "engines" / "overlay"
MODEL = PEERS / "models" / "SmolLM2-135M-Instruct"
DRAFT = ROOT / "drafters" / "smollm2-135m-instruct" / "dflash_drafter_smollm2"
NAME, DRAFTED = "smollm2", 7
QUESTIONS = ("Write a quicksort in Python.", "What is the capital of France, and what is it known for?",
             "A train goes 60 miles in 1.5 hours. How fast is it?", "Write a short poem about the sea.")
OUT = Console(highlight=False, soft_wrap=True)


def environment(plugin: bool, threads: int, **more: str) -> dict[str, str]:
    """One process, and no core reserved for a scheduler, as in bench/peers; with or without the plugin."""
    openmp = PEERS / "vllm" / "lib" / "libiomp5.so"
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
             "VLLM_CACHE_ROOT": str(PEERS / "vllm" / "cache")}
    found |= {"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}
    found |= os.environ | more | {"OMP_NUM_THREADS": str(threads)}
    found.pop("PYTHONPATH", None)
    return found | ({"PYTHONPATH": str(OVERLAY)} if plugin else {})


def trace(way: str, options: argparse.Namespace) -> dict:
    """One run: with the plugin, with the plugin and its attention, without it, or without it but with per-layer norms.
    """
    plugin = way in ("with", "attention")
    tokenizer = load_tokenizer("smollm2")
    prompts = [tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": q}])) for q in QUESTIONS]
    job = {"model": str(MODEL), "draft": str(DRAFT), "drafted": DRAFTED, "tokens": options.tokens,
           "eager": not options.compile, "prompts": prompts, "own_norms": way == "mended"}
    log = PEERS / f"last-trace-{way}.log"
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        question, reply = Path(folder, "job.json"), Path(folder, "reply.json")
        question.write_text(json.dumps(job), encoding="utf-8")
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "DFLASH_VLLM_ENABLE": "attention" if way == "attention" else ""}
        done = subprocess.run([PYTHON, "-m", "bench.engines.traced", question, reply], stdout=output, stderr=output,
                              env=environment(plugin, options.threads, **more), timeout=options.timeout)
        if done.returncode:
            raise SystemExit(f"vLLM ended with {done.returncode}; see {log.relative_to(ROOT)}")
        return json.loads(reply.read_text(encoding="utf-8")) | {"plugin": said(log)}


def alone(options: argparse.Namespace) -> dict:
    """Context K/V and attention outside the engine."""
    log = PEERS / "last-alone.log"
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        reply = Path(folder, "reply.json")
        done = subprocess.run([PYTHON, "-m", "bench.engines.alone", reply], stdout=output, stderr=output,
                              env=environment(True, options.threads), timeout=options.timeout)
        if done.returncode:
            raise SystemExit(f"alone.py ended with {done.returncode}; see {log.relative_to(ROOT)}")
        return json.loads(reply.read_text(encoding="utf-8"))


def said(log: Path) -> list[str]:
    """The plugin's log lines, each once."""
    lines = [line.partition("dflash-kernels: ")[2].strip() for line in log.read_text(errors="replace").splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def serve(options: argparse.Namespace) -> dict:
    """Starts vLLM's server on loopback with the plugin, runs the client's scenes, and stops the server."""
    log = PEERS / "last-serve.log"
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    speculative = json.dumps({"method": "dflash", "model": str(DRAFT), "num_speculative_tokens": DRAFTED})
    # What `vllm serve` runs. The command itself asks for the version of a package "vllm", which here is "vllm-cpu".
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--served-model-name", NAME,
               "--host", "127.0.0.1", "--port", str(port), "--speculative-config", speculative, "--max-model-len",
               "1024", "--max-num-seqs", "32", "--dtype", "bfloat16", *["--enforce-eager"] * (not options.compile)]
    with log.open("wb") as output, tempfile.TemporaryDirectory() as folder:
        env = environment(True, options.threads)
        server = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
        try:
            began = time.perf_counter()
            wait("vLLM", base, server, options.timeout, 1, f"; see {log.relative_to(ROOT)}")
            started, reply = time.perf_counter() - began, Path(folder, "reply.json")
            done = subprocess.run([PYTHON, "-m", "bench.engines.client", base, NAME, reply], env=env,
                                  timeout=options.timeout)
            if done.returncode:
                raise SystemExit(f"the client ended with {done.returncode}; see {log.relative_to(ROOT)}")
            found = json.loads(reply.read_text(encoding="utf-8")) | {"seconds_to_start": round(started, 1)}
        finally:
            stop(server)
    m = found["metrics"]
    found["acceptance_length"] = round(1 + m["accepted_tokens"] / m["drafts"], 4)
    return found | {"plugin": said(log)}


def stop(server: subprocess.Popen, patience: float = 30) -> None:
    """Stops the server and its children, which share its session: first by request, then by force."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def step_by_step(a: dict, b: dict) -> dict[str, int]:
    """Compares the drafts and K/V rows of two runs, at the positions of a prompt where both have one."""
    counts = dict.fromkeys(("steps", "same_steps", "ids", "same_ids", "rows", "same_rows"), 0)
    for x, y in zip(a["alone"], b["alone"], strict=True):
        for one, many, key in (("steps", "ids", "steps"), (None, "rows", "rows")):
            mine, theirs = dict(x[key]), dict(y[key])
            for at in mine.keys() & theirs.keys():
                same = sum(p == q for p, q in zip(mine[at], theirs[at], strict=True))
                counts[many] += len(mine[at])
                counts[f"same_{many}"] += same
                if one:
                    counts[one] += 1
                    counts[f"same_{one}"] += same == len(mine[at])
    return counts


def compare(runs: dict[str, list[dict]]) -> dict:
    """Compares the bits of the first run of each way, and the times of all runs. Ways: with, attention, without, and
    mended (without, but with per-layer norms)."""
    first = {way: found[0] for way, found in runs.items()}
    pairs = [(a, b) for a in ("with", "attention") for b in ("without", "mended") if a in first and b in first]
    return {"same_text": len({json.dumps(f["texts"]) for f in first.values()}) == 1,
            "same_text_in_a_batch": len({json.dumps(f["batched"]) for f in first.values()}) == 1,
            "step_by_step": {f"{a} / {b}": step_by_step(first[a], first[b]) for a, b in pairs},
            "beside": first["with"]["beside"], "backends": {way: f["backends"] for way, f in first.items()},
            "us": {name: {way: round(1e6 * statistics.median(t for run in found for t in run["parts"][name]), 1)
                          for way, found in runs.items()} for name in first["with"]["parts"]},
            "acceptance_length": {w: round(1 + f["accepted"] / f["drafts"], 4) for w, f in first.items()},
            "tokens_per_s": {w: round(statistics.median(r["tokens"] / r["seconds"] for r in found), 2)
                             for w, found in runs.items()}}


def command(options: argparse.Namespace) -> str:
    """The command that repeats the run."""
    words = f"--rounds {options.rounds} --tokens {options.tokens} --threads {options.threads}"
    return f'make engine-vllm ARGS="{words}{" --compile" * options.compile}"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("serve", "trace", "alone"))
    parser.add_argument("--rounds", type=int, default=1, help="runs of each way, alternating")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each prompt")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which takes minutes at every start")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--note", default="", help="a note for readers of the results, such as a busy machine")
    parser.add_argument("--json", type=output, default=results_folder() / "engine-vllm.json")
    options = parser.parse_args()
    if not PYTHON.is_file():
        raise SystemExit(f"vLLM is not installed: {(PEERS / 'vllm.log').relative_to(ROOT)} says why")
    if not (MODEL / "config.json").is_file():
        export("smollm2", MODEL)
    result = {"kind": "engine", "engine": "vllm-cpu", "header": {
        "cpu": build_info()["cpu"], "threads": options.threads, "commit": commit(), "eager": not options.compile,
        "rounds": options.rounds, "note": options.note, "command": command(options),
        "date": time.strftime("%Y-%m-%d")}}
    for name, measure in (("alone", alone), ("serve", serve)):
        if options.only in (None, name):
            result[name] = measure(options)
            OUT.print(json.dumps(result[name], indent=1), markup=False)
    if options.only in (None, "trace"):
        ways = ["without", "with", "attention"]
        runs = {way: [] for way in ways}
        for number in range(options.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                runs[way].append(trace(way, options))
        result["compare"] = compare(runs | {"mended": [trace("mended", options)]})
        result["header"]["versions"] = runs["with"][0]["versions"]
        OUT.print(json.dumps(result["compare"], indent=1), markup=False)
    if options.only:
        result = (json.loads(options.json.read_text()) if options.json.is_file() else {}) | {
            key: value for key, value in result.items() if key != "header" or options.only == "trace"}
    write_json(options.json, result)
