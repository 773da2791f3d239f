"""What is known of a draft's chance, and of a step's: from what became of those before."""

import json
import math
import random

import pytest

from dflash_decode.chances import Calibration
from dflash_decode.checkpoint import CheckpointError
from dflash_decode.model.calibration import read_calibration
from dflash_decode.past_widths import PastWidths


def test_a_calibration_follows_what_is_accepted():
    found, dice = Calibration(3), random.Random(0)
    assert found(0, 0.5) == pytest.approx(0.5) and found(0, math.nan) == found(0, 0.0) < 0.001 and found(2, 1.0) > 0.999
    for _ in range(3000):
        sure = dice.random()
        found.observe(0, sure, dice.random() < sure**3)
    for sure in (0.3, 0.5, 0.7, 0.9):
        assert found(0, sure) == pytest.approx(sure**3, abs=0.12)
    for _ in range(300):
        found.observe(1, 0.5, True)
    assert found(1, 0.5) > 0.9
    start = Calibration(3, (0.5, [1.0, -1.0]))
    assert start(0, 0.5) == pytest.approx(1 / (1 + math.exp(-1))) and start(2, 0.5) == start(1, 0.5) < 0.3
    assert start(0, 0.9) == pytest.approx(1 / (1 + math.exp(-1 - 0.5 * math.log(9))))


def test_a_drafter_s_record_is_where_its_calibration_starts(tmp_path):
    assert read_calibration(tmp_path, 3) is None
    file = tmp_path / "calibration.json"
    file.write_text('{"slope": 2, "bias": [0.5, 0, -1]}')
    assert read_calibration(tmp_path, 3) == (2.0, [0.5, 0.0, -1.0])
    for slope, bias in ((None, [0, 0, 0]), (True, [0, 0, 0]), ("1", [0, 0, 0]), (101, [0, 0, 0]), (1, [0, 0]),
                        (1, None), (1, [0, 0, "0"]), (math.nan, [0, 0, 0]), (1, [0, 0, math.inf])):
        file.write_text(json.dumps({"slope": slope, "bias": bias}))
        with pytest.raises(CheckpointError, match="calibration.json: (slope|bias) must be a"):
            read_calibration(tmp_path, 3)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match="calibration.json"):
        read_calibration(tmp_path, 3)


def test_the_past_chooses_among_recorded_widths():
    for row, sure, best in ((0.02, 0.95, 8), (0.5, 0.2, 1), (0.25, 0.8, 4)):
        past, dice, counts = PastWidths(8), random.Random(1), {}
        for i in range(500):
            width = past.step(1)
            assert width in past.steps() == (1, 4, 8)
            accepted = next((j for j in range(width - 1) if dice.random() >= sure), width - 1)
            past.observe(1, width, 1.0 + row * width + 0.1 * (width > 1), [accepted])
            counts[width] = counts.get(width, 0) + (i >= 200)
        assert counts[best] > 250, (row, sure, counts)
