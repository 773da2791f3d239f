"""What a benchmark does with its peers, and what `make gpu` runs."""

import sys
from pathlib import Path

import gpu
import pytest
import torch
from cases import Case, Sizes, agreeing, footnotes, line, measure

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
    cases = [Case("op", str(x), lambda i, x=x: torch.full((2,), x), 8, check=agreeing(lambda: torch.zeros(2).long()))
             for x in (1, 0)]
    wrong, right = measure(cases, 1, SIZES)
    assert wrong == {"op": "op", "case": "1", "wrong": "result 0: other integers"} and right["us"] > 0
    assert "WRONG" in capsys.readouterr().out and footnotes([wrong, right]) == []


def commands(monkeypatch, *words):
    ran = []
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    monkeypatch.setattr(gpu, "run", lambda words, end, at_once=1: ran.append(words) or "passed")
    return gpu.main(), ran


def test_the_dry_run_is_the_whole_script_on_the_stand_in(monkeypatch, capsys):
    code, ran = commands(monkeypatch, "dry")
    assert code == 0 and ran[0][1:] == ["setup.py", "-q", "build_ext", "--inplace"]
    wet = [words for part in gpu.PARTS for words in gpu.STEPS[part]]
    assert len(ran) == 1 + len(wet)
    folders = set()
    for command, words in zip(ran[1:], wet, strict=True):
        assert command[:3 + len(words)] == [sys.executable, *gpu.DRY, *words]
        if "bench/run.py" in words:
            assert "--tiny" in command
            folders.add(command[command.index("--folder") + 1])
    assert len(folders) == 1 and not Path(folders.pop()).exists()
    assert "left out, as there is no GPU" in capsys.readouterr().out


def test_parts(monkeypatch, capsys):
    assert len(commands(monkeypatch, "dry", "step")[1]) == 2
    assert commands(monkeypatch, "everything") == (2, []) and "tests, ops, step" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    assert commands(monkeypatch, "ops") == (2, []) and "needs a GPU" in capsys.readouterr().err
