"""Writes training text with the target: `tokens` tokens of answers, in parts that later runs reuse.

    python -m tools.training.write --out build/texts --tokens 10000000 --prompts questions.jsonl

A part is a file of 500 conversations and is kept whole or not at all. The same command goes on where a run ended.
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dflash_decode import Session
from dflash_decode.cache import write_whole
from tools.training.texts import ANSWER, Writer, read_jsonl, read_text

PART = 500  # conversations in a file
MOST_TOKENS = 3072  # of an answer


def read_prompts(file: Path) -> list[str]:
    """The prompts of JSON lines with `turns` or `prompt`, or of a JSON list of texts; either may be gzipped."""
    if (text := read_text(file)).lstrip().startswith("["):
        return json.loads(text)
    return [row["prompt"] if "prompt" in row else row["turns"][0] for row in read_jsonl(file)]


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("texts-*.jsonl.gz"))


def read_parts(folder: Path) -> list[dict]:
    return [row for file in parts(folder) for row in read_jsonl(file)]


def read_answers(paths: Iterable[Path]) -> list[dict]:
    """The conversations of files, and of folders of parts."""
    return [row for path in paths for row in (read_parts if path.is_dir() else read_jsonl)(path)]


def keep_part(folder: Path, rows: list[dict]) -> None:
    file = folder / f"texts-{len(parts(folder)):04d}.jsonl.gz"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(file, gzip.compress(lines.encode(), 9, mtime=0))


def write(session: Session, folder: Path, tokens: int, given: list[tuple[str, str]], without: list[str], *,
          concurrency: int, seed: int = 0, part: int = PART, minutes: float = math.inf, **how) -> None:
    """Adds parts to `folder` until its answers have `tokens` tokens, or for so many minutes. without: prompts that are
    never asked. how: of Writer. Says how many prompts were too long."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = read_parts(folder)
    have = sum(row["tokens"] for row in kept)
    writer = Writer(session, given, {row["prompt"] for row in kept} | set(without), concurrency=concurrency,
                    seed=seed + len(kept), **how)
    with tqdm(total=tokens, initial=min(have, tokens), unit="tok", desc=f"writing {folder}", smoothing=0.05) as bar:
        for rows in _batches(writer, bar, tokens - have, part, time.perf_counter() + 60 * minutes):
            keep_part(folder, rows)
    if writer.skipped:
        print(f"{writer.skipped} prompts were skipped: they leave no room for an answer in {writer.context} tokens")


def _batches(writer: Writer, bar: tqdm, tokens: int, part: int, until: float) -> Iterator[list[dict]]:
    rows: list[dict] = []
    if tokens > 0:
        for row in writer.conversations():
            rows.append(row)
            tokens -= row["tokens"]
            bar.update(row["tokens"])
            if tokens <= 0 or time.perf_counter() > until:
                break
            if len(rows) == part:
                yield rows
                rows = []
    if rows:
        yield rows


def write_texts(model: str, folder: Path, tokens: int, prompts: list[Path], without: list[Path], *,
                device: str = "cpu", weights: str = "auto", concurrency: int | None = None, **how) -> None:
    """`write` for a model's name and files of prompts."""
    given = [(file.name.split(".")[0], prompt) for file in prompts for prompt in read_prompts(file)]
    never = [prompt for file in without for prompt in read_prompts(file)]
    session = Session.load(model, "none", weights=weights, device=device)
    write(session, folder, tokens, given, never,
          concurrency=concurrency or (512 if torch.device(device).type == "cuda" else 32), **how)


def answer_tokens(text: str) -> int:
    if not text.isdecimal() or not 16 <= int(text) <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"must be between 16 and {MOST_TOKENS:,}; got {text}")
    return int(text)


def variables(text: str) -> dict[str, Any]:
    try:
        if isinstance(found := json.loads(text), dict):
            return found
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a JSON object; got {text}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default="smollm2", help="the target, as `dflash-kernels generate` takes it")
    p.add_argument("--weights", default="auto", help="how its weights are kept, likewise")
    p.add_argument("--out", type=Path, default=Path("build/texts"), help="folder of the parts")
    p.add_argument("--tokens", type=int, default=1_000_000, help="tokens of answers that the folder shall have")
    p.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, however many there are")
    p.add_argument("--prompts", type=Path, nargs="*", default=[], help="prompts to answer before the target's own: "
                   "JSON lines with `turns` or `prompt`, or a JSON list")
    p.add_argument("--without", type=Path, nargs="*", default=[], help="prompts that must not be answered: those of "
                   "the evaluation, and of texts that are there already")
    p.add_argument("--sampled", type=float, default=0.1, help="share of the answers written at temperature 0.8")
    p.add_argument("--max-tokens", type=answer_tokens, default=ANSWER, help="maximum length of an answer")
    p.add_argument("--template", type=variables, default={}, help="variables of the chat template, as JSON: "
                   """'{"enable_thinking": false}'""")
    p.add_argument("--concurrency", type=int, help="texts written concurrently; by default 32 on a CPU, 512 on a GPU")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    write_texts(args.model, args.out, args.tokens, args.prompts, args.without, weights=args.weights,
                device=args.device, concurrency=args.concurrency, seed=args.seed, budget=args.max_tokens,
                sampled=args.sampled, minutes=args.minutes, template=args.template)


if __name__ == "__main__":
    main()
