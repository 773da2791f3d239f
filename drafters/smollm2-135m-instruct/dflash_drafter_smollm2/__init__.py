"""A DFlash drafter for SmolLM2-135M-Instruct, in z-lab's format."""

from pathlib import Path


def directory() -> Path:
    """Where config.json and model.safetensors are."""
    return Path(__file__).resolve().parent
