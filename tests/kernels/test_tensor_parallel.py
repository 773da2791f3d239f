"""A vocabulary, experts or their columns shared out over ranks: every rank ends with the ids that one process has."""

import multiprocessing
import os
import sys

import pytest
import torch
import torch.distributed as dist

from dflash_kernels import (
    combine_argmax,
    combine_topk,
    expert_mlp,
    lm_head_argmax,
    lm_head_topk,
    pack_experts,
    route_experts,
)

RANKS, ROWS, HIDDEN, VOCAB, VALID, K = 2, 7, 96, 1000, 970, 12
EXPERTS, CHOSEN, INNER = 8, 3, 64


def head(dtype):
    """With ties across the shards, and a padded tail that would win."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    best = (x.float() @ weight[:VALID // 2].float().T).argmax(-1)
    weight[600:600 + ROWS] = weight[best]  # in the other shard, equal to the bit
    weight[VALID:] = 100 * x.float().mean(0).to(dtype)
    return x, weight


def gathered(t):
    """(ranks, ...): one collective, whose shape depends on configuration alone."""
    out = t.new_empty(RANKS, *t.shape)
    dist.all_gather(list(out), t)
    return out


def shard(x, weight, rank):
    width = VOCAB // RANKS
    first = rank * width
    valid = min(VALID, first + width) - first
    own = weight[first:first + width]
    ids, values = lm_head_argmax(x, own, num_valid=valid, id_offset=first)
    ids, _ = combine_argmax(gathered(values), gathered(ids))
    top, top_values, lse = lm_head_topk(x, own, K, num_valid=valid, id_offset=first)
    top, top_values, lse = combine_topk(gathered(top_values), gathered(top), gathered(lse))
    return ids, top, top_values, lse


def layer(dtype):
    """A router, its experts and a head: what each decides depends on the one before."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"router": (EXPERTS, HIDDEN), "gate_up": (EXPERTS, 2 * INNER, HIDDEN), "down": (EXPERTS, HIDDEN, INNER)}
    made = {name: (torch.randn(size, generator=generator) / size[-1]**0.5).to(dtype) for name, size in sizes.items()}
    return made | {"bias": torch.randn(EXPERTS, generator=generator) * 0.1}


def part_of_experts(w, rank):
    """gate_up, down and arguments of a rank with some of the experts."""
    own = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
    return pack_experts(w["gate_up"][own]), pack_experts(w["down"][own]), {"first_expert": own.start,
                                                                       "num_experts": EXPERTS}


def part_of_columns(w, rank):
    """The same of a rank with some of the columns of all of them."""
    own = slice(rank * INNER // RANKS, (rank + 1) * INNER // RANKS)
    gate_up = w["gate_up"].unflatten(1, (2, INNER))[:, :, own].flatten(1, 2)
    return pack_experts(gate_up), pack_experts(w["down"][:, :, own]), {}


PARTS = (part_of_experts, part_of_columns)


def routed(x, w):
    return route_experts(x.float() @ w["router"].float().T, CHOSEN, bias=w["bias"], scoring="sigmoid")


def summed(parts, dtype):
    """Partial sums in the order of the ranks, wherever they were computed."""
    return sum(part.float() for part in parts).to(dtype)


def sparse(x, weight, rank):
    """For each way of sharing: the experts, the sums, and the ids that the head finds in them."""
    w, found = layer(x.dtype), []
    for part in PARTS:
        gate_up, down, more = part(w, rank)
        ids, weights = routed(x, w)
        sums = summed(gathered(expert_mlp(x, gate_up, down, ids, weights, **more)), x.dtype)
        found += [ids, sums, lm_head_argmax(sums, weight)[0]]
    return found


def worker(rank, address, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.save({str(dtype): (*shard(*head(dtype), rank), sparse(*head(dtype), rank))
                for dtype in (torch.float32, torch.bfloat16)}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_give_one_process_its_ids(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, f"file://{tmp_path}/rendezvous", str(tmp_path)))
                 for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = head(dtype)
        ids, _ = lm_head_argmax(x, weight, num_valid=VALID)
        top, values, lse = lm_head_topk(x, weight, K, num_valid=VALID)
        assert (ids < VALID // 2).any() and (top >= 600).any()  # ties were there to be got wrong
        for rank in range(RANKS):
            found = torch.load(tmp_path / f"{rank}.pt")[str(dtype)]
            assert torch.equal(found[0], ids) and torch.equal(found[1], top) and torch.equal(found[2], values)
            torch.testing.assert_close(found[3], lse)
            assert_sparse(found[4], x, weight)


def assert_sparse(found, x, weight):
    """Both ranks' partial sums, added in one process, are the same bits. The layer whole is within the parts' rounding
    of them, which in bfloat16 may decide between two tokens that are nearly equal."""
    w = layer(x.dtype)
    ids, weights = routed(x, w)
    whole = expert_mlp(x, pack_experts(w["gate_up"]), pack_experts(w["down"]), ids, weights)
    for part, (experts, sums, top) in zip(PARTS, (found[:3], found[3:]), strict=True):
        parts = [expert_mlp(x, *given, ids, weights, **more) for *given, more in (part(w, r) for r in range(RANKS))]
        assert torch.equal(experts, ids) and torch.equal(sums, summed(parts, x.dtype))
        if x.dtype == torch.bfloat16:
            torch.testing.assert_close(sums, whole, rtol=2e-2, atol=2e-2)
        else:
            torch.testing.assert_close(sums, whole)
            assert torch.equal(top, lm_head_argmax(whole, weight)[0])
