"""What the ops and whole decoders cost, beside other people's and the memory's limit. Not part of the package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
