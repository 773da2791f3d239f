"""What a benchmark does with its peers and its rows."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import case as cases
from bench.case import Case, Sizes, agreeing, footnotes, line, measure
from bench.ops.measure import Kept

SIZES = Sizes("cpu", tiny=True)


def measured(peers, **options):
    x = torch.arange(8.0)
    case = Case("op", "c", lambda i: x * 3, 32, peers={"torch": lambda i: x * 3, **peers},
                check=agreeing(lambda: (x * 3,), lambda: (x * 3,)), **options)
    return measure([case], 2, SIZES)[0]


def test_a_peer_has_a_time_or_a_reason(capsys):
    def broken(i):
        raise OSError("no such driver\nmore")

    row = measured({"late": lambda i: (lambda: torch.arange(8.0) * 3), "wrong": lambda i: torch.arange(8.0) * 3.1,
                    "short": lambda i: (torch.zeros(8), 1), "broken": broken, "gone": "not for this machine"})
    assert list(row["peers"]) == ["torch", "late"] and list(row["without"]) == ["wrong", "short", "broken", "gone"]
    assert row["without"]["wrong"].startswith("wrong differs in op, c: result 0: 7 of 8 elements are over the budget")
    assert row["without"]["short"] == "short differs in op, c: 2 results for 1"
    assert row["without"]["broken"] == "broken fails in op, c: OSError: no such driver"
    assert row["without"]["gone"] == "gone: not for this machine"
    assert footnotes([row, row]) == list(row["without"].values())
    assert " x torch, " in line(row) and "late" in capsys.readouterr().out


def test_integers_are_compared_exactly():
    check = agreeing(lambda: torch.tensor([1, 2]))
    check((torch.tensor([1, 2], dtype=torch.int32),))
    with pytest.raises(AssertionError, match="other integers"):
        check((torch.tensor([1, 3]),))


def test_a_wrong_result_of_ours_has_no_time_and_the_next_case_is_measured(capsys):
    made = [Case("op", str(x), lambda i, x=x: torch.full((2,), x), 8, check=agreeing(lambda: torch.zeros(2).long()))
            for x in (1, 0)]
    wrong, right = measure(made, 1, SIZES)
    assert wrong == {"op": "op", "case": "1", "wrong": "result 0: other integers"} and right["us"] > 0
    assert "WRONG" in capsys.readouterr().out and footnotes([wrong, right]) == []


def test_a_row_is_kept_before_the_next_case_begins():
    kept, seen = [], []

    def two():
        for name in "ab":
            seen.append(list(kept))
            yield Case("op", name, lambda i: torch.zeros(2), 8)

    measure(two(), 1, SIZES, lambda row: kept.append(row["case"]))
    assert seen == [[], ["a"]] and kept == ["a", "b"]


def test_without_peers_none_is_made():
    assert Sizes("cuda", peers=False).peers_of("op", None) == {}


def test_on_a_gpu_a_case_that_fails_is_told_and_the_next_is_measured(monkeypatch):
    """What a first run on a GPU finds must not cost the cases behind it; on a CPU it is a bug to be seen."""
    def broken(i):
        raise RuntimeError("out of resource: shared memory\nmore")

    case = Case("op", "c", broken, 8)
    row = cases.measured(case, 1, "cuda", None)
    assert row == {"op": "op", "case": "c", "wrong": "fails: RuntimeError: out of resource: shared memory"}
    with pytest.raises(RuntimeError):
        cases.measured(case, 1, "cpu", None)


def rows_of(file):
    return [(row["op"], row["case"], row["us"]) for row in json.loads(file.read_text())["rows"]]


def test_a_file_is_added_to_and_a_case_that_is_measured_again_replaces_its_row(tmp_path):
    file, options = tmp_path / "cases.json", SimpleNamespace(runs=1, device="cpu", tiny=True, add=True)
    first = Kept(file, {"device": "d", "commit": "abc"}, ["x"], options)
    for name, us in (("a", 1), ("b", 2)):
        first.keep({"op": "op", "case": name, "us": us})
    second = Kept(file, {"device": "d"}, ["y"], options)
    second.keep({"op": "op", "case": "a", "us": 3})
    assert rows_of(file) == [("op", "b", 2), ("op", "a", 3)]
    assert json.loads(file.read_text())["command"].count("bench.ops") == 2
    assert [row["commit"] for row in json.loads(file.read_text())["rows"]] == ["abc", None]
    options.add = False
    Kept(file, {"device": "d"}, ["y"], options).keep({"op": "op", "case": "c", "us": 4})
    assert rows_of(file) == [("op", "c", 4)]


def test_bytes_of_layers_are_those_of_all_their_weights():
    pytest.importorskip("transformers")
    from tests.support.decode_models import make_target

    _, target = make_target("llama")
    parts = [w for layer in target._layers for of in (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down)
             for w in of.parts]
    assert cases.packed_bytes(*target._layers) == sum(w.data.nbytes for w in parts) and len(parts) >= 16
