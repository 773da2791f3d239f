"""The GPU that a launch is for."""

import functools

import torch


@functools.cache
def generation(device: torch.device) -> int:
    """The major compute capability; the oldest one's where kernels are interpreted."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; an H100's where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
