"""A drafter's own record of how far its confidence can be trusted."""

import os
from pathlib import Path

from ..checkpoint.errors import CheckpointError, read_json
from ..checkpoint.fields import Fields

FILE = "calibration.json"
_MOST = 100.0


def read_calibration(folder: str | os.PathLike, positions: int) -> tuple[float, list[float]] | None:
    """The slope, and a bias for each of the block's drafts, of {"slope": number, "bias": [number, ...]}: where
    chances.Calibration starts. None if there is no such file. Raises CheckpointError."""
    file = Path(folder) / FILE
    if not os.path.lexists(file):
        return None
    f = Fields(str(file), read_json(file), error=CheckpointError)
    slope = f.get("slope")
    if not _number(slope):
        f.refuse("slope", f"a number between -{_MOST:g} and {_MOST:g}", slope)
    bias = f.get("bias")
    if not isinstance(bias, list) or len(bias) != positions or not all(map(_number, bias)):
        f.refuse("bias", f"a list of {positions} numbers between -{_MOST:g} and {_MOST:g}", bias)
    return float(slope), [float(b) for b in bias]


def _number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -_MOST <= x <= _MOST
