"""Weights in blocks with random codes, and scales of a weight's size, for benchmarks and tests."""

import torch

from dflash_kernels.formats import EVERY

SCALES = {"q6_k": slice(208, 210), "q4_1": slice(0, 4), "q5_1": slice(0, 4), "q4_k": slice(0, 4), "q5_k": slice(0, 4)}


def blocks(name: str, n: int, k: int) -> torch.Tensor:
    """Rows (n, bytes of k elements) uint8 as a file has them."""
    f = EVERY[name]
    rows = torch.randint(0, 256, (n, k // f.block, f.bytes), dtype=torch.uint8)
    scales = SCALES.get(name, slice(0, 2))
    values = torch.randn(*rows.shape[:2], (scales.stop - scales.start) // 2) * (2e-4 if f.block == 256 else 0.01)
    rows[..., scales] = values.half().view(torch.uint8)
    if name == "uint4_g128":
        rows[..., 2] %= 17  # zero points: 0 to 15, and in GPTQ's files 16
    return rows.view(n, -1)
