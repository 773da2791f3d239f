"""Memory stays as it is, however many requests come, leave and fail. What is counted is what is alive, not pages of the
process, which other things move."""

import gc
import random
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.requests import Event, Live, Request
from dflash_decode.sampling import SamplingParams
from tests.support.decode_runs import PROMPTS, random_target

pytestmark = pytest.mark.alone

# Blocks of memory that Python itself may keep of what is gone: its lists of free tuples, frames and floats fill up to
# whatever the most alive at once happened to be. For each request; a leak has one or more.
FREE_LISTS = 2 / 3


class Fails:
    def __init__(self, at):
        self.at = at

    def fill_bitmask(self, tokens, words):
        if len(tokens) >= self.at:
            raise RuntimeError("no such rule")


def mixed(dice, n):
    """Requests of every kind, some of which cannot run or fail."""
    for i in range(n):
        sampling = dice.choice([SamplingParams(), SamplingParams(0.8, seed=i), SamplingParams(logit_bias={3: 1.0}),
                                SamplingParams(grammar=Fails(dice.randint(0, 9))), SamplingParams(temperature=10**400)])
        yield Request(i, dice.choice([*PROMPTS, [], None]), dice.randint(1, 12), (), sampling)
        if dice.random() < 0.2:
            yield None


def serve(decoder, n, seed=0):
    """A stream with cancellations; how many requests ended in which way."""
    dice, ends = random.Random(seed), {}
    for event in decoder.stream(mixed(dice, n)):
        if event.finish:
            ends[event.finish] = ends.get(event.finish, 0) + 1
        elif dice.random() < 0.05:
            decoder.cancel(event.id)
    return ends


@pytest.fixture(autouse=True)
def others():
    """What other tests have left alive is not counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def passes_of(decoder):
    runner = decoder.runner
    return [work for made in (runner.prefills, runner.verifies, runner.drafts, runner.contexts)
            for work in made.values()]


def alive(decoder):
    """Objects, tensors' bytes, recorded launches and pages; and Python's blocks of memory, which `flat` compares: what
    the collector does not track, such as strings and numbers, is no object here."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if issubclass(type(o), torch.Tensor) and not issubclass(type(o), FakeTensor)]
    graphs = [work.work.graph for work in passes_of(decoder) if work.work.graph]
    bytes_of = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    known = len(decoder.pool.prefixes.pages())  # by digests, each a block; at most as many as there are pages
    return {"blocks": sys.getallocatedblocks() - known, "objects": len(objects), "tensors": len(tensors),
            "bytes": sum(bytes_of.values()), "graphs": len(graphs),
            "launches": sum(map(len, graphs)), "pages": decoder.pool.num_pages - decoder.pool.free_pages,
            "requests": sum(type(o) in (Live, Event) for o in objects)}


def flat(before, after, requests):
    """Nothing more is alive than before so many requests."""
    grown = after["blocks"] - before["blocks"]
    return {**after, "blocks": 0} == {**before, "blocks": 0} and grown < requests * FREE_LISTS


def decoder_of(speculative=True):
    target = random_target("llama", torch.float32, "cpu", hidden=16, inner=16, heads=1, kv_heads=1, layers=2)
    drafter = Drafter.random(target, num_layers=1, block_size=3) if speculative else None
    decoder = Decoder(target, drafter, max_batch=4, max_context=64, page_size=4, prefill_rows=16)
    decoder.warm_up()
    return decoder


@pytest.mark.parametrize("speculative", [True, False])
def test_memory_stays_flat_over_mixed_requests_and_cancellations(speculative):
    decoder = decoder_of(speculative)
    serve(decoder, 150, seed=1)
    ends = serve(decoder, 150)
    alive(decoder)  # the first count makes what classes note of others
    assert set(ends) == {"length", "error", "cancelled"} and min(ends.values()) >= 5 and sum(ends.values()) == 150
    before = alive(decoder)
    assert before["requests"] == before["pages"] == 0 and before["graphs"] >= 4
    for _ in range(4):
        serve(decoder, 150)
    assert flat(before, alive(decoder), 600)


def test_memory_stays_flat_while_a_server_steps():
    """Never idle: a new request comes before the last has left."""
    decoder, dice, counts = decoder_of(), random.Random(1), []
    for i in range(800):
        decoder.submit(
            Request(
                i,
                dice.choice(PROMPTS),
                dice.randint(2, 8),
                (),
                dice.choice([SamplingParams(), SamplingParams(0.8), SamplingParams(logit_bias={3: 1.0})]),
            )
        )
        while len(decoder._requests) > 3:
            decoder.step()
        if i % 7 == 0:
            decoder.cancel(i)
        if i % 200 == 199:
            alive(decoder)
            counts.append(alive(decoder))
    assert max(c["requests"] for c in counts) <= 3
    assert len({(c["launches"], c["graphs"]) for c in counts[1:]}) == 1
    # Requests that run have objects and bytes of their own, at most 3 of them.
    assert max(c["objects"] for c in counts[1:]) - min(c["objects"] for c in counts[1:]) < 100
    assert counts[-1]["blocks"] - counts[1]["blocks"] < 400 * FREE_LISTS
    # Prompts and answers that run are no tensors.
    assert len({(c["tensors"], c["bytes"]) for c in counts[1:]}) == 1


if __name__ == "__main__":
    decoder = decoder_of()
    for i in range(40):
        serve(decoder, 500, seed=i)
        print(i, alive(decoder), flush=True)
