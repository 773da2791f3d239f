"""What a pass costs: curves of seconds by size, sizes of passes, and what is remembered of them."""

import math

import pytest

from dflash_decode import costs
from dflash_decode.costs import Curve, pass_size, pass_sizes, remembered


def test_a_curve_is_what_was_measured_and_never_falls():
    curve = Curve({1: 2.0, 4: 5.0, 8: 4.0})
    assert [curve(n) for n in (1, 2, 4, 6, 8, 16)] == pytest.approx([2.0, 3.0, 5.0, 5.0, 5.0, 10.0])


def test_a_load_moves_every_size_and_one_time_does_not_move_much():
    curve = Curve({1: 1.0, 8: 2.0})
    curve.observe(8, 50.0)
    assert curve(8) < 2.6 and curve(1) < 1.1
    curve = Curve({1: 1.0, 8: 2.0})
    for _ in range(100):
        curve.observe(8, 4.0)
    assert curve(8) == pytest.approx(4.0, rel=0.01) and curve(1) > 1.05
    curve.observe(3, 3.0)
    assert 3 in curve.table()


@pytest.mark.parametrize("bad", [{}, {0: 1.0}, {1: 0.0}, {1: math.inf}, {1: math.nan}])
def test_a_curve_of_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="Curve: measured must have positive sizes and seconds; got"):
        Curve(bad)


@pytest.mark.parametrize("most", [1, 2, 7, 8, 9, 20, 64, 100, 256])
def test_sizes_of_passes(most):
    sizes = pass_sizes(most)
    assert sizes[-1] == most and sizes == sorted(set(sizes))
    for rows in range(1, most + 1):
        size = pass_size(rows, most)
        assert size == next(n for n in sizes if n >= rows) and size <= max(rows * 1.25, 1)


TIMES = {"verify": {1: 2.0, 8: 4.0, 64: 20.0}, "draft": {8: 1.0}}


def measuring(asked, times):
    def measure(few):
        asked.append(few)
        return times

    return measure


def test_costs_are_remembered_by_machine_and_forgotten_where_they_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "cache_dir", lambda: tmp_path / "there")
    asked = []
    measure = measuring(asked, TIMES)
    for _ in range(2):
        assert remembered({"cpu": "a"}, measure).verify.table() == pytest.approx(TIMES["verify"])
    remembered({"cpu": "b"}, measure)
    assert asked == [False, True, False]
    for text in ("", "[]", "{}", '{"key": {"cpu": "a"}, "verify": [[1, -1]], "draft": []}', "[" * 10**5,
                 '{"key": {"cpu": "a"}, "verify": [[1e999, 1]], "draft": []}'):
        for file in (tmp_path / "there" / "costs").iterdir():
            file.write_text(text)
        asked.clear()
        remembered({"cpu": "a"}, measure)
        assert asked == [False], text
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(costs, "cache_dir", lambda: tmp_path / "file")  # nothing can be written there
    assert remembered({"cpu": "a"}, measure).verify.table() == pytest.approx(TIMES["verify"])
    monkeypatch.setattr(costs, "cache_dir", lambda: None)
    assert remembered({"cpu": "a"}, measure).verify.table() == pytest.approx(TIMES["verify"])


def test_a_busy_machine_is_slower_and_leaves_no_trace(monkeypatch, tmp_path):
    """The shape is that of the best times, the pace that of now, whichever was measured first."""
    monkeypatch.setattr(costs, "cache_dir", lambda: tmp_path)
    busy = {"verify": {1: 20.0, 8: 8.0, 64: 40.0}, "draft": {8: 9.0}}
    found = remembered("m", measuring([], busy))
    assert found.verify.table() == pytest.approx({1: 8.0, 8: 8.0, 64: 40.0})  # 20.0 was not a pass of one row
    found = remembered("m", measuring([], {"verify": {1: 2.0, 8: 4.0}, "draft": {8: 1.0}}))
    assert found.verify.table() == pytest.approx({1: 2.0, 8: 4.0, 64: 40.0})
    assert found.draft.table() == pytest.approx({8: 1.0})
    found = remembered("m", measuring([], {"verify": {1: 6.0, 8: 12.0}, "draft": {8: 9.0}}))
    assert found.verify.table() == pytest.approx({1: 6.0, 8: 12.0, 64: 120.0})
    assert found.draft.table() == pytest.approx({8: 3.0})
    assert remembered("m", measuring([], TIMES)).verify.table() == pytest.approx(TIMES["verify"])
