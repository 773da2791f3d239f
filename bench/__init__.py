"""Benchmarks of ops and complete decoders against peers and the bandwidth limit. Not part of the package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PROMPTS = ROOT / "bench" / "prompts"
