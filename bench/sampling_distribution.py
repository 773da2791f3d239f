"""Tests whether sampled output follows SmolLM2's distribution: one prompt's first tokens over many seeds, with baseline
and speculative decoding.

    python -m bench.sampling_distribution [--seeds N] [--temperature T] [--top-p P] [--batch B] [--prompt TEXT]
                                          [--no-write]

With greedy drafts each seed must give the tokens of baseline sampling, so both have one distribution. For it, and for
sampled drafts under either rule, chi-square tests compare the first token and the pairs of the first two with the exact
distribution in float64. All four tokens of sampled drafts are compared with baseline sampling of other seeds. The
prompt's K/V are shared by all texts of a batch. Writes bench/results/<device>/sampling_distribution.json.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace

import torch

from bench.case import Sizes, header, results_folder
from dflash_bench.results import write_json
from dflash_decode.kv import PagePool
from dflash_decode.requests import Live, Request
from dflash_decode.sampling import SamplingParams
from dflash_decode.step import Prefill, Step
from dflash_decode.verify import SampledVerifier
from dflash_kernels.reference import sample as reference

PROMPT = "Write a short story about a lighthouse."
TOKENS, FIRSTS = (
    4,
    64,
)  # tokens of each text; first tokens after which the second is compared with its exact distribution


class Texts:
    """Short texts that begin with one prompt, `batch` at a time, on pages that share the prompt."""

    def __init__(self, target, drafter, prompt, batch, tokens=TOKENS, width=TOKENS):
        self.target, self.drafter, self.prompt = target, drafter, list(prompt)
        self.batch, self.tokens, self.width, self.page = batch, tokens, width, len(prompt)
        own = -(-(tokens + width) // self.page)
        self.pool = PagePool(1 + batch * own, self.page)
        shared, = self.pool.allocate(1)
        self.tables = [self.pool.table_row([shared, *self.pool.allocate(own * self.page)], own + 1)
                       for _ in range(batch)]
        self.kv = [model.cache.allocate(self.pool.num_pages, self.page) if model else () for model in (target, drafter)]
        prefill = Prefill(target, drafter, *self.kv, self.page, self.page, len(self.tables[0]))
        self.row = prefill(self.prompt, 0, self.tables[0]).clone()
        self.steps = {}

    def _step(self, drafter, draw, rule):
        key = (drafter is None, draw, rule)
        if key not in self.steps:
            width = self.width if drafter else 1
            self.steps[key] = Step(self.target, drafter, self.kv[0], self.kv[1] if drafter else (), self.batch, width,
                                   self.page, len(self.tables[0]),
                                   SampledVerifier(self.target, self.batch, width, rule), draw)
        return self.steps[key]

    def sample(self, sampling: SamplingParams, seeds, *, speculative=True, draw=False, rule="token"):
        """The tokens (len(seeds), tokens) of each seed, and the drafts that each first step accepted."""
        texts, accepted = [], []
        for start in range(0, len(seeds), self.batch):
            some = seeds[start:start + self.batch]
            lives = [Live(Request(i, self.prompt, self.tokens), self.tokens, replace(sampling, seed=seed))
                     for i, seed in enumerate(some)]
            first = SampledVerifier(self.target, len(lives), 1)
            first.seat(lives)
            lens = torch.full((len(lives),), self.page - 1, dtype=torch.int32)
            ids = torch.full((len(lives), 1), self.prompt[-1])
            found = first.run(self.row.repeat(len(lives), 1), ids, lens).bonus.tolist()
            texts += (batch := [[token] for token in found])
            step = self._step(self.drafter if speculative else None, draw, rule)
            step.seat(self.tables[:len(lives)], lives)
            while any(len(text) < self.tokens for text in batch):
                step.fill([(text[-1], self.page + len(text) - 1, step.width if len(text) < self.tokens else 0)
                           for text in batch])
                out = step()
                if all(len(text) == 1 for text in batch):
                    accepted += out.accept_lens[:len(batch)].tolist()
                for text, tokens, count in zip(batch, out.tokens.tolist(), out.commit_lens.tolist(), strict=False):
                    text += tokens[:count]
        return torch.tensor([text[:self.tokens] for text in texts]), sum(accepted) / len(accepted)

    def distribution(self, sampling: SamplingParams, after=None) -> torch.Tensor:
        """The exact distribution (n, V), float64, of the first token, or of the one after each of the n tokens
        `after`."""
        rows = self.row if after is None else self._rows(after)
        logits = torch.zeros((len(rows), self.target.vocab_size), dtype=self.target.dtype)
        self.target.logits(rows, logits)
        one = {name: torch.tensor([value]) for name, value in
               (("top_k", sampling.top_k), ("top_p", sampling.top_p), ("min_p", sampling.min_p))}
        return torch.cat(
            [
                reference.distribution(row[None, None].float(), torch.tensor([sampling.temperature]), **one)[0]
                for row in logits
            ]
        )

    def _rows(self, after):
        n = len(after)
        ids, positions = torch.tensor(after)[:, None], torch.full((n, 1), self.page)
        table = torch.stack(self.tables[:n])
        slots = table[:, 1:2].long() * self.page
        ints = [torch.full((n,), value, dtype=torch.int32) for value in (self.page, 1)]
        return self.target.make_pass(n, 1, self.kv[0]).run(ids, positions, slots, table, *ints)[0]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """p-value and degrees of freedom of counts with a known expectation; cells below 5 are pooled."""
    counts, expected = counts.double(), expected.double()
    if bool((counts[expected <= 0] > 0).any()):
        return 0.0, 0
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return _tail(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


def two_samples(one: Counter, other: Counter) -> tuple[float, int]:
    """p-value and degrees of freedom for two samples of one distribution; values seen less than 10 times are pooled."""
    pairs = [(one[key], other[key]) for key in one | other]
    often = [pair for pair in pairs if sum(pair) >= 10]
    rest = [sum(side) for side in zip(*(pair for pair in pairs if sum(pair) < 10), strict=True)]
    table = torch.tensor([*often, *([rest] if rest else [])], dtype=torch.float64)
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    return _tail(((table - expected) ** 2 / expected).sum(), len(table) - 1)


def _tail(statistic, freedom):
    if freedom < 1:
        return 1.0, 0
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, statistic / 2).item(), freedom


def against_distribution(texts: Texts, found: torch.Tensor, sampling: SamplingParams) -> dict:
    """p-values of the first token, and of the first two where the first is among the most likely."""
    n, vocab = len(found), texts.target.vocab_size
    first = texts.distribution(sampling)[0]
    likely = first.topk(min(FIRSTS, int((first > 0).sum()), texts.batch)).indices
    second = texts.distribution(sampling, likely.tolist()) * first[likely, None]
    place = torch.full((vocab,), len(likely)).scatter_(0, likely, torch.arange(len(likely)))[found[:, 0]]
    known = place < len(likely)
    pairs = (place * vocab + found[:, 1])[known].bincount(minlength=len(likely) * vocab)
    counts = torch.cat((pairs, (~known).sum()[None]))
    expected = torch.cat((second.flatten(), (1 - second.sum()).clamp_min(0)[None])) * n
    single, pair = chi_square(found[:, 0].bincount(minlength=vocab), first * n), chi_square(counts, expected)
    return {"first_token": figures(single), "first_two": figures(pair)}


def figures(result: tuple[float, int]) -> dict:
    return {"p": round(result[0], 6), "degrees_of_freedom": result[1]}


def measure(texts: Texts, sampling: SamplingParams, seeds: int) -> dict:
    """Measures every way of decoding with seeds of its own; greedy drafts use those of baseline sampling."""
    started = time.perf_counter()
    baseline, _ = texts.sample(sampling, range(seeds), speculative=False)
    same, accepted = texts.sample(sampling, range(seeds))
    found = {"baseline": against_distribution(texts, baseline, sampling),
             "greedy drafts": {"same_texts": int((baseline == same).all(1).sum()), "of": seeds,
                               "accepted_in_the_first_step": round(accepted, 4)}}
    for i, rule in enumerate(("token", "block"), 1):
        name = f"drawn drafts, by {rule}"
        got, accepted = texts.sample(sampling, range(i * seeds, (i + 1) * seeds), draw=True, rule=rule)
        both = two_samples(*(Counter(map(tuple, t.tolist())) for t in (baseline, got)))
        found[name] = against_distribution(texts, got, sampling) | {
            "four_tokens_against_baseline": figures(both), "accepted_in_the_first_step": round(accepted, 4)}
        print(f"{name}: {found[name]}, {time.perf_counter() - started:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    from dflash_decode.session import Session

    session = Session.load("smollm2")
    sampling = SamplingParams(options.temperature, top_p=options.top_p)
    texts = Texts(session.target, session.drafter, session.prompt_ids(options.prompt), options.batch)
    found = measure(texts, sampling, options.seeds)
    result = {
        "kind": "sampling distribution",
        "header": header(Sizes()),
        "prompt": options.prompt,
        "seeds": options.seeds,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "ways": found,
    }
    print(found["baseline"], found["greedy drafts"])
    if not options.no_write:
        write_json(results_folder("cpu") / "sampling_distribution.json", result)


if __name__ == "__main__":
    main()
