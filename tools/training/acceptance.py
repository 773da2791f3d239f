"""Acceptance lengths of drafters over the same answers, without decoding for each: the target answers the prompts once,
and every drafter drafts the blocks that decoding would draft (tools/training/replay.py).

    python -m tools.training.acceptance --prompts gsm8k.jsonl --drafters auto build/drafter/checkpoint

Blocks are whole: a loop that verifies fewer drafts, where they do not pay, accepts fewer.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dflash_decode import Session

from .replay import Replay, Text, rates_by_position
from .texts import ROOM, read_jsonl


def answered(session: Session, prompts: Sequence[str], tokens: int, concurrency: int) -> list[Text]:
    """The prompts with the baseline's greedy answers, where they fit into a text."""
    ids = [session.prompt_ids(prompt) for prompt in prompts]
    run = session.run(ids, max_tokens=tokens, concurrency=concurrency, speculative=False)
    return [Text(number, [*asked, *answer.tokens], len(asked))
            for number, (asked, answer) in enumerate(zip(ids, run.answers, strict=True))
            if len(answer.tokens) >= 2 and len(asked) + len(answer.tokens) <= ROOM + tokens]


def accepted_of(session: Session, texts: Sequence[Text], batch: int) -> dict[int, list[int]]:
    """By the text's number, how many drafts of each of its blocks were accepted."""
    found: dict[int, list[int]] = {}
    for blocks in Replay(session, batch, 1, max(len(text.ids) for text in texts)).blocks(texts):
        for number, accepted in zip(blocks.texts.tolist(), blocks.accepted.tolist(), strict=True):
            found.setdefault(number, []).append(accepted)
    return found


def figures(accepted: Sequence[int], block: int) -> dict:
    """by_position: as of rates_by_position."""
    rates = rates_by_position(torch.tensor(accepted), block)
    return {"blocks": len(accepted), "acceptance_length": round(1 + sum(accepted) / len(accepted), 4),
            "by_position": [rate if rate is None else round(rate, 4) for rate in rates]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default="smollm2", help="the target, as `dflash-kernels generate` takes it")
    p.add_argument("--drafters", nargs="+", default=["auto"], help="drafters, likewise")
    p.add_argument("--prompts", type=Path, nargs="+", required=True, help="files of prompts: JSON lines with `task` "
                   "and `turns`")
    p.add_argument("--limit", type=int, help="of each file only so many prompts")
    p.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    p.add_argument("--concurrency", type=int, default=16, help="texts that are written or drafted next to each other")
    p.add_argument("--json", type=Path, help="a file for the results")
    args = p.parse_args()
    rows = [row for file in args.prompts for row in read_jsonl(file)[:args.limit]]
    texts = answered(Session.load(args.model, "none"), [row["turns"][0] for row in rows], args.max_tokens,
                     args.concurrency)
    texts.sort(key=lambda text: -len(text.ids))  # those that end together were begun together
    if not texts:
        raise SystemExit(f"--prompts must have some that leave room for an answer in {ROOM + args.max_tokens} tokens")
    print(f"{len(texts)} answers of {sum(len(t.ids) - t.start for t in texts)} tokens", flush=True)
    result = {"model": args.model, "limit": args.limit, "max_tokens": args.max_tokens, "drafters": {}}
    for name in args.drafters:
        session = Session.load(args.model, name)
        found, by_task = accepted_of(session, texts, args.concurrency), {}
        for number, accepted in found.items():
            by_task.setdefault(rows[number]["task"], []).extend(accepted)
        tasks = {task: figures(accepted, session.block_size) for task, accepted in sorted(by_task.items())}
        mean = sum(t["acceptance_length"] for t in tasks.values()) / len(tasks)
        result["drafters"][name] = {"mean_of_tasks": round(mean, 4), "tasks": tasks}
        lengths = "  ".join(f"{task} {t['acceptance_length']:.3f}" for task, t in tasks.items())
        print(f"{name}: {lengths}  mean {mean:.3f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
