"""The command that times a wheel's library beside the tree's, without timing: what it refuses, which time counts, the
table."""

import json
import zipfile

import pytest

import setup
from bench import wheel
from bench.report import wheel_table


def test_a_library_of_other_sources_is_refused(tmp_path, monkeypatch):
    mark, file, root = setup.sources_mark().encode(), tmp_path / "a.whl", tmp_path / "tree"
    monkeypatch.setattr(wheel, "ROOT", root)
    (root / "dflash_kernels").mkdir(parents=True)

    def packed(content):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(str(wheel.LIBRARY), content)

    packed(b"\0" + mark)
    with pytest.raises(SystemExit, match="tree/dflash_kernels/_C.abi3.so must be built from these sources; got no"):
        wheel.checked(file, tmp_path / "unpacked")
    (root / wheel.LIBRARY).write_bytes(mark)
    wheel.checked(file, tmp_path / "unpacked")
    packed(mark[:-1])
    with pytest.raises(SystemExit, match="unpacked/dflash_kernels/_C.abi3.so must be built from these sources; got "):
        wheel.checked(file, tmp_path / "unpacked")


def result(gbps, **us):
    return {"header": {"isa": "avx2"},
            "rows": [{"op": "linear", "case": c, "us": t, "limit_gbps": gbps} for c, t in us.items()]}


def test_the_processes_of_the_closest_bandwidth_count(tmp_path):
    rows = wheel.rows_of([("tree", result(60.0, a=1.0, b=10.0)), ("wheel", result(35.0, a=2.0, b=15.0))], [])
    assert rows[0]["closest"] == ([1.0, 60.0], [2.0, 35.0])
    rows = wheel.rows_of([("tree", result(36.0, a=2.0, b=12.5))], rows)
    assert [row["closest"] for row in rows] == [([2.0, 36.0], [2.0, 35.0]), ([12.5, 36.0], [15.0, 35.0])]
    far, = wheel.rows_of([("tree", result(60.0, c=1.0)), ("wheel", result(35.0, c=9.0))], [])
    (tmp_path / "d").mkdir()
    head = {"device": "D", "threads": 2, "torch": "2.13", "tree": "12", "wheel": "Clang 22"}
    (tmp_path / "d/wheel.json").write_text(json.dumps({"header": head, "command": "c", "rows": [*rows, far]}))
    block = wheel_table.wheel_block(tmp_path)
    assert "D, 2 threads, torch 2.13, the wheel by Clang 22, the tree by g++ 12: `c`." in block
    assert "| `linear` | avx2 | 2 | 1.10 | 1.00 to 1.20 |" in block
