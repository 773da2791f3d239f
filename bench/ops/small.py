"""The ops behind the LM heads: shards combined, drafts sampled or selected.

They move kilobytes, so their cost is a launch; the share of the limit shows how little bandwidth they use.
"""

import math
from types import SimpleNamespace

import torch

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes, agreeing

# shards, requests, drafted slots, K, vocabulary
GEOMETRIES = {"cpu": {"smollm2": (4, 8, 7, 16, 49152)}, "cuda": {"qwen3-8b": (4, 8, 15, 16, 151936)},
              "tiny": {"tiny": (2, 2, 3, 4, 100)}}
TEMPERATURE, RANK = 0.8, 256


def cases(sizes: Sizes):
    for shards, requests, slots, k, vocab in GEOMETRIES[sizes.name].values():
        yield combine_case(sizes, shards, requests * slots, vocab)
        yield combine_topk_case(sizes, shards, requests * slots, k, vocab)
        yield draft_case(sizes, requests, slots, k, vocab)
        yield select_case(sizes, requests, slots, k, vocab)


def combine_case(sizes, shards, rows, vocab):
    moved = cost.combine_bytes(shards, rows)
    copies = sizes.copies_of(moved)
    values, ids = torch.randn(copies, shards, rows), torch.randint(0, vocab, (copies, shards, rows))
    out_ids, out_values = torch.empty(rows, dtype=torch.int64), torch.empty(rows)

    def expression(values, ids):
        best, shard = values.max(0)
        return ids.gather(0, shard[None])[0], best

    problem = SimpleNamespace(expression=expression, args=lambda i: (values[i], ids[i]))
    return Case("combine_argmax", f"{shards} shards, {rows} rows",
                lambda i: dk.combine_argmax(values[i], ids[i], out_ids=out_ids, out_values=out_values), moved, copies,
                peers=sizes.peers_of("combine_argmax", problem),
                check=agreeing(*2 * [lambda: expression(values[0], ids[0])]))


def combine_topk_case(sizes, shards, rows, k, vocab):
    moved = cost.combine_bytes(shards, rows, k=k, lse=True)
    copies = sizes.copies_of(moved)
    values = torch.randn(copies, shards, rows, k).sort(-1, descending=True).values
    ids = torch.randint(0, vocab, (copies, shards, rows, k))
    lse = torch.randn(copies, shards, rows) + math.log(vocab)  # as of that many logits of size 1
    out = [torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k), torch.empty(rows)]

    def run(i):
        return dk.combine_topk(values[i], ids[i], lse[i], out_ids=out[0], out_values=out[1], out_lse=out[2])

    def expression(values, ids, lse):
        top = values.transpose(0, 1).flatten(1).topk(k)
        return ids.transpose(0, 1).flatten(1).gather(1, top.indices), top.values, lse.logsumexp(0)

    def exact(values, ids, lse):
        return *expression(values, ids, lse)[:2], lse.double().logsumexp(0)

    args = lambda i: (values[i], ids[i], lse[i])  # noqa: E731
    return Case("combine_topk", f"{shards} shards, {rows} rows, K {k}", run, moved, copies,
                peers=sizes.peers_of("combine_topk", SimpleNamespace(expression=expression, args=args)),
                check=agreeing(lambda: exact(*args(0)), lambda: expression(*args(0))))


def draft_case(sizes, requests, slots, k, vocab):
    moved = cost.draft_bytes(requests, slots, k)
    copies = sizes.copies_of(moved)
    values = torch.randn(copies, requests, slots, k).sort(-1, descending=True).values
    ids, lens = torch.randint(0, vocab, (copies, requests, slots, k)), torch.full((requests,), 100, dtype=torch.int32)
    params = dk.SamplingTensors(torch.full((requests,), TEMPERATURE), torch.arange(requests))
    out = [torch.empty(requests, slots, dtype=torch.int64), torch.empty(requests, slots, k)]

    def run(i):
        return dk.sample_draft(values[i], ids[i], lens, params, out_ids=out[0], out_probs=out[1])

    def expression(values, ids):
        p = (values / TEMPERATURE).softmax(-1)
        return ids.gather(-1, torch.multinomial(p.flatten(0, 1), 1).view(requests, slots, 1))[..., 0], p

    def check(got):
        """Every draw is another, so the distribution is compared, and whether the ids are among the candidates."""
        torch.testing.assert_close(got[1], (values[0] / TEMPERATURE).softmax(-1))
        assert (got[0][..., None] == ids[0]).any(-1).all(), "an id that is no candidate"

    problem = SimpleNamespace(expression=expression, args=lambda i: (values[i], ids[i]))
    return Case("sample_draft", f"{requests} x {slots} slots, K {k}", run, moved, copies,
                cost.sample_flops(requests, slots, k), sizes.peers_of("sample_draft", problem), check)


def select_case(sizes, requests, slots, k, vocab):
    """Greedy, with the rank of published codebooks. Numbers in few bits: no two candidates tie by rounding alone."""
    moved = cost.select_bytes(requests, slots, k, RANK, 2)
    copies = sizes.copies_of(moved)
    values = torch.randn(copies, requests, slots, k).sort(-1, descending=True).values
    ids, anchors = (torch.randint(0, vocab, (copies, *shape)) for shape in ((requests, slots, k), (requests,)))
    hidden = torch.randint(-1, 2, (copies, requests, slots, RANK)).to(sizes.dtype)
    codebooks = [torch.randint(-1, 2, (vocab, RANK)).to(sizes.dtype) for _ in range(2)]
    lens = torch.full((requests,), 100, dtype=torch.int32)
    out, logprobs = torch.empty(requests, slots, dtype=torch.int64), torch.empty(requests, slots)

    def run(i):
        dk.select_candidates(values[i], ids[i], hidden[i], anchors[i], *codebooks, lens, out_ids=out,
                             out_logprobs=logprobs)
        return (out,)

    def expression(values, ids, hidden, before):
        path = []
        for slot in range(slots):
            step = codebooks[0][before] * hidden[:, slot]
            scores = values[:, slot] + torch.einsum("br,bkr->bk", step, codebooks[1][ids[:, slot]])
            before = ids[:, slot].gather(1, scores.argmax(-1, keepdim=True))[:, 0]
            path.append(before)
        return (torch.stack(path, 1),)

    args = lambda i: (values[i], ids[i], hidden[i], anchors[i])  # noqa: E731
    problem = SimpleNamespace(expression=expression, args=args, codebooks=codebooks)
    return Case("select_candidates", f"{requests} x {slots} slots, K {k}, rank {RANK}", run, moved, copies,
                cost.select_flops(requests, slots, k, RANK), sizes.peers_of("select_candidates", problem),
                agreeing(lambda: expression(*args(0))))
