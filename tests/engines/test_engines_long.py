"""An engine that runs long keeps nothing: no object, no tensor's memory, no byte, however small, for each call."""

import gc
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from dflash_engines.vllm import verify
from tests.support import attention_parts as attention
from tests.support import fake_vllm as fake

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(monkeypatch):
    """All hooks of the V1 runner, and the attention backend, which the engine makes for itself."""
    engine = fake.running(monkeypatch)
    engine.model, engine.backend = engine.model(), attention.fresh_backend(monkeypatch)
    engine.layer = attention.layer_of(engine.backend, True)
    return engine


def serve(engine, steps):
    """Batches of all sizes come, are drafted for, checked and leave."""
    for step in range(steps):
        tokens, requests = 1 + step * 7 % 90, 1 + step % 5
        states, slots = torch.randn(tokens, fake.HIDDEN), torch.arange(tokens) % (fake.PAGE * fake.PAGES)
        slots[24:] = -1
        engine.model.precompute_and_store_context_kv(states, torch.arange(tokens) % 60, slots)
        layer, made = engine.layer, attention.built(engine.backend, [1 + step % 9, 0])
        q, k, v = (torch.randn(6, heads, fake.HEAD_DIM) for heads in (attention.HEADS, fake.KV_HEADS, fake.KV_HEADS))
        layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache, torch.arange(6))
        layer.impl.forward(layer, q, k, v, layer.kv_cache, made, torch.empty_like(q))
        drafts = engine.drafter._greedy_sample(torch.randn(3 * requests, fake.HIDDEN)).int()
        engine.runner.input_batch = fake.Runner(all_greedy=step % 4 > 0).input_batch
        engine.sampler.rejection_sample(
            drafts, [3] * requests, 3, None, None, torch.randn(3 * requests, fake.VOCAB),
            torch.zeros(requests, 1).long(), engine.runner.input_batch.sampling_metadata)
        if step % 50 == 0:  # another engine in the process that comes and goes
            fake.make(type(engine.drafter), runner=fake.Runner())._greedy_sample(torch.randn(2, fake.HIDDEN))


def kept():
    """Live objects, bytes of Python's memory, bytes of tensors."""
    sys._clear_type_cache()  # it holds names of attributes
    gc.collect()
    traced = tracemalloc.get_traced_memory()[0]
    objects = gc.get_objects()
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
               for t in objects if issubclass(type(t), torch.Tensor) and not issubclass(type(t), FakeTensor)}
    return len(objects), traced, sum(tensors.values())


def growth(run, rounds=4):
    """The least that any of some equal rounds added: what is kept for each call is added in all of them."""
    found = np.zeros((rounds + 1, 3), dtype=np.int64)  # so that noting it allocates nothing
    tracemalloc.start()
    try:
        run()
        for row in found:
            run()
            row[:] = kept()
    finally:
        tracemalloc.stop()
    return np.diff(found, axis=0).min(0).tolist()


@pytest.mark.alone
def test_an_engine_that_runs_long_keeps_nothing(engine):
    torch.manual_seed(0)
    assert max(growth(lambda: serve(engine, 150))) <= 0
    assert list(verify.RUNNERS) == [engine.runner]


def test_what_the_collector_does_not_count_is_seen():
    there = []
    for keep, size in ((dict, 48), (lambda: bytearray(4096), 4096)):  # a thousand, beside what others free
        _, traced, _ = growth(lambda keep=keep: there.extend(keep() for _ in range(1_000)))
        assert traced > 1_000 * size
