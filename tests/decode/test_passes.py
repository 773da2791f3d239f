"""Which recorded pass serves a step."""

import torch

from dflash_decode.costs import StepCosts
from dflash_decode.loop import Decoder
from dflash_decode.model.drafter import Drafter
from dflash_decode.verify import GreedyVerifier
from dflash_decode.widths import WidthPolicy
from tests.support.decode_runs import random_target


def test_a_pass_is_recorded_once_longer_ones_have_cost_what_that_takes():
    target = random_target("qwen3", torch.float32, "cpu", hidden=32, heads=2, kv_heads=1, layers=3)
    runner = Decoder(target, Drafter.random(target, 2, 8), max_batch=2, max_context=80, page_size=4).runner
    assert runner.rows_to_run(2, 5, GreedyVerifier) == 5  # nothing is recorded that could serve
    runner.policy, runner.recording = WidthPolicy(8, StepCosts({1: 1.1, 16: 2.6}, {8: 0.1})), 1.0
    for rows in (4, 8, 16):
        runner.verify_stage(2, rows, runner.longest, GreedyVerifier)
    assert [runner.rows_to_run(2, rows, GreedyVerifier) for rows in (4, 7, 8, 15)] == [4, 8, 8, 16]
    assert [runner.rows_to_run(2, 5, GreedyVerifier) for _ in range(5)] == [8, 8, 8, 5, 5]  # 0.3 is lost each time
    assert runner.rows_to_run(1, 5, GreedyVerifier) == 5  # one request has its own
