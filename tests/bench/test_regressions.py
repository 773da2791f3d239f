"""docs/regressions.md knows the tests of every fault: those that are named, and those of each P-number."""

import re
from collections import defaultdict

from tests.support import ROOT

PAGE = (ROOT / "docs/regressions.md").read_text(encoding="utf-8")
FAULT = re.compile(r"^\| P(\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def by_name():
    """Every test's name, and the files that it is in."""
    found = defaultdict(set)
    for file in ROOT.glob("tests/**/test_*.py"):
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            found[name].add(str(file.relative_to(ROOT)))
    return found


def numbered():
    """The files with tests of each P-number: a name begins with one number or with more."""
    found = defaultdict(set)
    for name, files in by_name().items():
        for number in re.findall(r"p(\d+)_", re.match(r"test_((?:p\d+_)*)", name)[1]):
            found[int(number)] |= files
    return found


def test_every_number_has_a_row_that_names_the_files_of_its_tests():
    rows = {int(number): set(re.findall(r"`([^`]+)`", files)) for number, _, _, files in FAULT.findall(PAGE)}
    assert len(rows) > 30 and rows == numbered()


def test_rows_are_in_order_with_a_source_each():
    rows = FAULT.findall(PAGE)
    numbers = [int(number) for number, *_ in rows]
    assert numbers == sorted(set(numbers)) and len(numbers) == len(re.findall(r"^\| P\d", PAGE, re.MULTILINE))
    for number, _, source, _ in rows:
        links = re.findall(r"\[[^]]+ #(\d+)\]\(https://github\.com/[\w.-]+/[\w.-]+/issues/(\d+)\)", source)
        assert all(said == linked for said, linked in links), f"P{number}: {source}"
        assert "](https://github.com/" in source or source.endswith("(no link recorded)"), f"P{number}: {source}"


def test_tests_that_are_named_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 50 and named <= by_name().keys()
