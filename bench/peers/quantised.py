"""Compares our loop on the blocks of a GGUF file with llama.cpp on the same file, for the formats that people download.

    python -m bench.peers.quantised --prompts FILE... [--types Q4_K_M ...]

llama.cpp's own program rounds the weights of the model's file to each type. That file has 4 bits itself, so the texts
are not those of files that are published: the comparison is of rates. Each type is a run of bench.peers, one request at
a time. Writes bench/results/<device>/quantised.json.
"""

import argparse
import subprocess
from collections import Counter
from pathlib import Path

import gguf

from bench.case import results_folder
from bench.peers.compare import BFLOAT16, MODEL, measure
from bench.peers.job import BASELINE, DFLASH
from bench.peers.peer import ENVIRONMENTS
from bench.peers.peer_llama import HOME
from bench.peers.sums import ALL
from dflash_bench.results import commit, output, write_json
from dflash_decode.checkpoint import drafter_of, find_model
from dflash_kernels import build_info

QUANTIZE = HOME / "build" / "bin" / "llama-quantize"
TYPES = ["Q4_0", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
OURS, LLAMA = "oursfile", "llama"
COMMAND = "python -m bench.peers.quantised --prompts"


def quantised(source: Path, kind: str) -> Path:
    """The file of that type, which is made where it is not there."""
    file = ENVIRONMENTS / "models" / f"{source.stem.split('.')[0]}.{kind}.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(".part")
        subprocess.run([QUANTIZE, "--allow-requantize", source, made, kind], check=True, capture_output=True)
        made.rename(file)
    return file


def formats(file: Path) -> dict[str, int]:
    """How many matrices there are of each format."""
    return Counter(t.tensor_type.name for t in gguf.GGUFReader(file).tensors if len(t.shape) == 2)


def compared(options: argparse.Namespace, kind: str) -> dict:
    file = quantised(find_model(MODEL), kind)
    settings = {"model": str(file), "drafter": drafter_of(MODEL), "only": [OURS, LLAMA], "concurrency": [1],
                "block_size": None, "dtype": BFLOAT16, "timeout": 3600, "json": None}
    result = measure(argparse.Namespace(**vars(options) | settings))
    rates = {(r["peer"], r["mode"], r["threads"]): r for r in result["rows"] if r["task"] == ALL}

    def rate(peer: str, mode: str) -> float:
        return rates[peer, mode, options.threads]["tokens_per_s"]

    return {"type": kind, "bytes": file.stat().st_size, "formats": formats(file), "llama": rate(LLAMA, BASELINE),
            "llama_dflash": rate(LLAMA, DFLASH), "ours": rate(OURS, BASELINE), "ours_dflash": rate(OURS, DFLASH),
            "acceptance_length": rates[OURS, DFLASH, options.threads]["acceptance_length"],
            "llama.cpp of": result["header"]["versions"][LLAMA]["llama.cpp of"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--limit", type=int, default=2, help="the first N prompts of each file")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=output)
    options = parser.parse_args()
    if not QUANTIZE.is_file():
        parser.error(f"{QUANTIZE.relative_to(HOME.parents[2])} must be there, which `make peers` builds")
    file = options.json or results_folder() / "quantised.json"
    words = [f"--{name} {getattr(options, name.replace('-', '_'))}" for name in ("limit", "max-tokens", "rounds")]
    names = " ".join(f.name for f in options.prompts)
    header = {"kind": "quantised", "model": MODEL, "cpu": build_info()["cpu"], "isa": build_info()["isa"],
              "threads": options.threads, "commit": commit(), "limit": options.limit, "max_tokens": options.max_tokens,
              "rounds": options.rounds, "tasks": len(options.prompts), "command": " ".join([COMMAND, names, *words])}
    rows: list[dict] = []
    for kind in options.types:
        rows.append(compared(options, kind))
        print(rows[-1], flush=True)
        write_json(file, {"header": header, "rows": rows})


if __name__ == "__main__":
    main()
