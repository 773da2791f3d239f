"""A vocabulary shared out over ranks: every rank ends with the ids that one process has."""

import multiprocessing
import os
import sys

import pytest
import torch
import torch.distributed as dist

from dflash_kernels import combine_argmax, combine_topk, lm_head_argmax, lm_head_topk

RANKS, ROWS, HIDDEN, VOCAB, VALID, K = 2, 7, 96, 1000, 970, 12


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


def worker(rank, address, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.save({str(dtype): shard(*head(dtype), rank) for dtype in (torch.float32, torch.bfloat16)},
               os.path.join(folder, f"{rank}.pt"))
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
