"""An op's cost, as its docstring says it."""

import re
from dataclasses import dataclass

import dflash_kernels
from bench.report import docstrings


@dataclass(frozen=True)
class Cost:
    """formulas: of bytes, in the letters of docs/ops.md; a second one is of what an option adds, or of other inputs.
    launches: in words."""

    formulas: list[str]
    launches: str


def cost_of(op: str) -> Cost:
    notes = docstrings.parse(getattr(dflash_kernels, op).__doc__).texts["Notes"]
    lines = [" ".join(text.split()) for text in notes.split("\n\n") if text.startswith("Cost: ")]
    assert len(lines) == 1, f"{op} must have one line of cost"
    found = re.fullmatch(r"Cost: (`.+` .*bytes.*)\. Launches on a GPU: (\d[^.]*)\.", lines[0])
    assert found, f"{op}: {lines[0]}"
    return Cost(re.findall(r"`([^`]+)`", found[1]), found[2])
