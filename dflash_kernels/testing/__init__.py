"""Reusable by anyone who tests kernels against a reference: error budgets, poison, and instruction-set control."""

from .budget import assert_within_budget, doubles, same_bits
from .isa import every_isa, use_isa

__all__ = ["assert_within_budget", "doubles", "every_isa", "same_bits", "use_isa"]
