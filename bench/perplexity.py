"""Perplexity of a GGUF model by how its weights are kept, and llama.cpp's on the same file and tokens.

    python -m bench.perplexity QUESTIONS.jsonl... [--model M] [--weights NAME...] [--llama PROGRAM] [--passages N]

The text is all questions, one after another, cut into passages of as many tokens; the second half of each is predicted
from what stands before it. This is what llama.cpp's program llama-perplexity does, whose text comes from the same file.
Writes bench/results/<device>/perplexity.json.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path

import torch

import dflash_kernels as dk
from bench.case import device_name, results_folder
from dflash_bench.results import commit, output, write_json
from dflash_decode import Session
from dflash_decode.checkpoint import find_model
from dflash_decode.choices import Weights
from dflash_decode.kv import PagePool
from dflash_decode.model import Target

KINDS = [word.value for word in Weights if word is not Weights.auto]


def text_of(files: list[Path]) -> str:
    questions = [json.loads(line)["turns"][0] for file in files for line in file.read_text("utf-8").splitlines()]
    return "\n\n".join(questions) + "\n"


def passages_of(tokens: list[int], length: int, most: int) -> torch.Tensor:
    """(passages, length) of whole passages."""
    found = torch.tensor(tokens[:len(tokens) // length * length]).view(-1, length)[:most]
    if len(found) < most:
        raise SystemExit(f"the questions must have {most} passages of {length} tokens; got {len(found)}")
    return found


class Passage:
    """A pass of the target over one passage, in memory of its own."""

    def __init__(self, target: Target, length: int):
        self.target, pool = target, PagePool(-(-length // 16), 16)
        caches = target.cache.allocate(pool.num_pages, pool.page_size)
        self.table = pool.table_row(pool.allocate(length), pool.num_pages)[None]
        self.nothing, self.whole = (torch.tensor([n], dtype=torch.int32) for n in (0, length))
        self.step = target.make_pass(1, length, caches)
        self.block = dk.prepare_block(torch.zeros(1, dtype=torch.int64), self.nothing, length, 0,
                                      page_table=self.table, page_size=pool.page_size)
        self.logits = torch.empty((length // 2 - 1, target.vocab_size), dtype=target.dtype)

    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """The negative log-likelihood of each token of the second half but its first, which no row there predicts."""
        half = len(tokens) // 2
        rows, _ = self.step.run(tokens[None], self.block.positions, self.block.slots, self.table, self.nothing,
                                self.whole)
        self.target.logits(rows[half:-1].contiguous(), self.logits)
        return -self.logits.float().log_softmax(-1).gather(-1, tokens[half + 1:, None])[:, 0]


def ours(model: str, kind: str, dtype: str, text: str, length: int, most: int) -> dict:
    session = Session.load(model, None, weights=kind, dtype=dtype)
    passages = passages_of(session.tokenizer.encode(text), length, most)
    passage = Passage(session.target, length)
    losses = torch.cat([passage.losses(tokens) for tokens in passages]).double()
    return {"weights": kind, "dtype": dtype, "perplexity": float(losses.mean().exp()),
            "error": float(losses.mean().exp() * losses.std() / math.sqrt(len(losses))), "tokens": len(losses)}


def llama(program: Path, file: Path, text: str, length: int, most: int, threads: int) -> dict:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as written:
        written.write(text)
        written.flush()
        done = subprocess.run([program, "--model", file, "--file", written.name, "--ctx-size", str(length), "--chunks",
                               str(most), "--batch-size", str(length), "--threads", str(threads)],
                              capture_output=True, text=True)
    said = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout + done.stderr)
    if said is None:
        raise SystemExit(f"{program} must tell a final estimate; got {done.stderr[-300:]!r}")
    return {"weights": "llama.cpp", "perplexity": float(said[1]), "error": float(said[2])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2", help="a GGUF file or a known name")
    parser.add_argument("--weights", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--llama", type=Path, metavar="PROGRAM", help="llama-perplexity")
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--length", type=int, default=128, help="tokens of a passage")
    parser.add_argument("--json", type=output, help="another file")
    options = parser.parse_args()
    text, sizes, rows = text_of(options.questions), (options.length, options.passages), []
    if options.llama:
        rows.append(llama(options.llama, find_model(options.model), text, *sizes, torch.get_num_threads()))
    for kind in options.weights:
        rows.append(ours(options.model, kind, options.dtype, text, *sizes))
    for row in rows:
        row["percent"] = 100 * (row["perplexity"] / rows[0]["perplexity"] - 1)
        print(f"{row['weights']:<10} {row['perplexity']:8.4f} +- {row['error']:.4f}  {row['percent']:+.2f} %")
    info = dk.build_info()
    write_json(options.json or results_folder() / "perplexity.json", {
        "header": {"device": device_name(), "threads": info["threads"], "isa": info["isa"], "torch": info["torch"],
                   "commit": commit()},
        "command": f"python -m bench.perplexity {' '.join(f.name for f in options.questions)} --passages "
                   f"{options.passages} --length {options.length}",
        "model": options.model, "passages": options.passages, "length": options.length, "kinds": rows})


if __name__ == "__main__":
    main()
