"""Trains DFlash2's selector for a drafter that stays as it is.

    python -m tools.training.selector --drafter DIR --answers build/texts --out DIR

The drafter fills its positions independently of each other, so two drafts that are likely alone may not follow each
other. The selector takes one of a position's candidates in view of the draft before it. Its codebooks are products of
the target's embedding, E Pa and E Pb, so a pair of tokens is judged by pairs like it, and a hundred thousand blocks are
enough. It is trained on the blocks that decoding drafts (tools/training/replay.py), each up to a little beyond its
first rejected draft.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from dflash_decode import Session
from dflash_decode.model.calibration import FILE as CALIBRATION
from dflash_decode.model.dflash2 import NAMES, PREFIX, read_selector, write_selector
from dflash_kernels import PackedWeight

from .replay import Blocks, Replay, greedy_texts, rates_by_position, weights_to_rejection
from .texts import ANSWER, ROOM
from .write import answer_tokens, read_answers

HELD_OUT = 12  # one text in so many


def collect(blocks: Iterable[Blocks], most: int) -> Blocks:
    """At least `most` blocks, if there are so many."""
    parts, have = [], 0
    with tqdm(total=most, unit="block", desc="drafting") as bar:
        for part in blocks:
            parts.append(part)
            have += len(part.texts)
            bar.update(len(part.texts))
            if have >= most:
                break
    if not parts:
        raise SystemExit("--answers must have greedy answers of two tokens or more, in texts that are not too long")
    return Blocks(*(torch.cat(column) for column in zip(*parts, strict=True)))


def take(blocks: Blocks, which: torch.Tensor) -> Blocks:
    return Blocks(*(column[which] for column in blocks))


class Selector(torch.nn.Module):
    """embedding (n, H): of the draft vocabulary's tokens. place (V,): a token's row of it, -1 for the others, which are
    rows of zeros."""

    def __init__(self, embedding: torch.Tensor, place: torch.Tensor, rank: int, seed: int = 0):
        super().__init__()
        hidden, random = embedding.shape[1], torch.Generator().manual_seed(seed)
        self.embedding = embedding.float() / embedding.float().pow(2).mean().sqrt()
        self.place = place

        def matrix(gain):
            return torch.nn.Parameter(torch.randn(hidden, rank, generator=random) * gain * hidden ** -0.5)

        self.before, self.after, self.hidden = matrix(1.0), matrix(0.1), matrix(1.0)

    def codebooks(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.embedding @ self.before, self.embedding @ self.after

    @torch.no_grad()
    def start_from(self, predecessor: torch.Tensor, successor: torch.Tensor, hidden: torch.Tensor) -> None:
        """Takes the weights of a selector whose codebooks (n, rank) are those, for the same vocabulary."""
        for matrix, book in ((self.before, predecessor), (self.after, successor)):
            matrix.copy_(torch.linalg.lstsq(self.embedding, book.float()).solution)
        self.hidden.copy_(hidden.float().T)

    def scores(self, books, hidden, values, ids, before) -> torch.Tensor:
        """hidden (..., H), values, ids (..., K), before (...) -> (..., K)."""
        predecessor, successor = books
        place = self.place[before]
        wanted = predecessor[place.clamp_min(0)] * (place >= 0)[..., None] * (hidden @ self.hidden)
        return values + torch.einsum("...r,...kr->...k", wanted, successor[self.place[ids]])


def before_each(blocks: Blocks) -> torch.Tensor:
    """(N, Q - 1): the text's token before each drafted position."""
    return torch.cat((blocks.anchors[:, None], blocks.truth[:, :-1].clamp_min(0)), 1)


def weights_of(blocks: Blocks) -> torch.Tensor:
    """(N, Q - 1): 1 up to the first rejected draft, less and less after it, and 0 from where the text's token is not
    among the candidates."""
    found = (blocks.ids == blocks.truth[..., None]).any(-1)
    return found.long().cumprod(-1) * weights_to_rejection(blocks.accepted, blocks.truth.shape[1] + 1)


def loss_of(selector: Selector, blocks: Blocks) -> torch.Tensor:
    scores = selector.scores(selector.codebooks(), blocks.hidden.float(), blocks.values, blocks.ids,
                             before_each(blocks))
    right, weight = blocks.ids == blocks.truth[..., None], weights_of(blocks)
    return -((torch.log_softmax(scores, -1) * right).sum(-1) * weight).sum() / weight.sum()


@torch.no_grad()
def walk(selector: Selector, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,): the drafts that are accepted with the selector. (N, Q - 1): its probability of each draft among the
    candidates."""
    books, before, run = selector.codebooks(), blocks.anchors, torch.ones_like(blocks.accepted)
    accepted, sure = torch.zeros_like(run), []
    for at in range(blocks.truth.shape[1]):
        ids = blocks.ids[:, at]
        odds = selector.scores(books, blocks.hidden[:, at].float(), blocks.values[:, at], ids, before).softmax(-1)
        best = odds.max(-1, keepdim=True)
        before = ids.gather(1, best.indices)[:, 0]
        run = run * (before == blocks.truth[:, at])
        accepted += run
        sure.append(best.values[:, 0])
    return accepted, torch.stack(sure, 1)


def calibration_of(accepted: torch.Tensor, sure: torch.Tensor) -> dict:
    """How far `sure` (N, Q - 1) is to be trusted: a logistic fit to the drafts that were verified, all up to the first
    rejected one, as chances.Calibration starts with."""
    places = torch.arange(sure.shape[1]).expand_as(sure)
    verified = places <= accepted[:, None]
    x, y, at = torch.logit(sure[verified], 1e-4), (places < accepted[:, None])[verified].float(), places[verified]
    slope, bias = torch.ones((), requires_grad=True), torch.zeros(sure.shape[1], requires_grad=True)
    fit = torch.optim.LBFGS([slope, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        fit.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(slope * x + bias[at], y)
        value.backward()
        return value

    fit.step(loss)
    return {"slope": round(slope.item(), 3), "bias": [round(b, 3) for b in bias.tolist()]}


def train(selector: Selector, blocks: Blocks, epochs: int, rate: float, size: int = 256) -> None:
    """Adam, with a rate that rises for 50 steps and falls to 0."""
    optimiser = torch.optim.Adam(selector.parameters(), lr=rate, betas=(0.9, 0.99))
    steps = epochs * (len(blocks.texts) // size)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, (n + 1) / 50) * (1 - n / steps))
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(epochs):
            for which in torch.randperm(len(blocks.texts)).split(size):
                if len(which) < size:
                    continue
                optimiser.zero_grad()
                loss = loss_of(selector, take(blocks, which))
                loss.backward()
                optimiser.step()
                rates.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"the loss is {loss.item()}")


def report(name: str, accepted: torch.Tensor, blocks: Blocks) -> None:
    rates = " ".join(f"{rate or 0:.3f}" for rate in rates_by_position(accepted, blocks.truth.shape[1] + 1))
    print(f"{name}: acceptance length {1 + accepted.float().mean().item():.3f}, by position {rates}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--model", default="smollm2", help="the target, as `dflash-kernels generate` takes it")
    p.add_argument("--drafter", default="auto", help="the drafter, likewise")
    p.add_argument("--answers", type=Path, nargs="+", required=True,
                   help="conversations that the target has written: files, or folders of tools.training.write")
    p.add_argument("--out", type=Path, required=True,
                   help="the drafter's folder, which gets candidate_selector/ and calibration.json")
    p.add_argument("--start", type=Path, help="a drafter's folder, whose selector of this rank is trained further")
    p.add_argument("--blocks", type=int, default=300_000, help="blocks to draft for training")
    p.add_argument("--answer-tokens", type=answer_tokens, default=ANSWER, help=f"longer texts than {ROOM} tokens and "
                   "so many are left out")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--candidates", type=int, default=16, help="most likely tokens that the selector chooses from")
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--rate", type=float, default=3e-3, help="Adam's learning rate")
    p.add_argument("--concurrency", type=int, default=16, help="texts that are drafted next to each other")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    session = Session.load(args.model, args.drafter)
    drafter, target = session.drafter, session.target
    if drafter.selector and drafter.selector.projection is None:
        p.error(f"--drafter must have no Markov head, beside which there is no selector; got {args.drafter}")
    rows = read_answers(args.answers)
    Random(args.seed).shuffle(rows)
    longest = ROOM + args.answer_tokens
    replay = Replay(session, args.concurrency, args.candidates, longest)
    blocks = collect(replay.blocks(greedy_texts(session, rows, longest)), args.blocks)
    ids = drafter.ids_of_draft if drafter.ids_of_draft is not None else torch.arange(drafter.num_valid)
    place = torch.full((target.vocab_size,), -1)
    place[ids] = torch.arange(len(ids))
    table = target.embedding
    selector = Selector(table.rows(ids) if isinstance(table, PackedWeight) else table[ids], place, args.rank, args.seed)
    if args.start:
        books, _ = read_selector(args.start, ids, target.vocab_size)
        before, after, hidden = (books[PREFIX + name] for name in NAMES)
        selector.start_from(before[ids], after[ids], hidden)
    held_out = blocks.texts % HELD_OUT == 0
    seen, new = (take(blocks, which.nonzero()[:, 0]) for which in (~held_out, held_out))
    report("as it was", new.accepted, new)
    train(selector, seen, args.epochs, args.rate)
    accepted, sure = walk(selector, new)
    report("selected", accepted, new)
    predecessor, successor = (book.detach() for book in selector.codebooks())
    write_selector(args.out, predecessor, successor, selector.hidden.detach().T, args.candidates)
    (args.out / CALIBRATION).write_text(json.dumps(calibration_of(accepted, sure)) + "\n")


if __name__ == "__main__":
    main()
