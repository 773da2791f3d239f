"""Reusable by anyone who tests kernels against a reference: error budgets, poison, and instruction-set control."""

from .budget import assert_within_budget, doubles, same_bits
from .cache import LAYOUTS, cache_views, poisoned_storage, rotary_table
from .isa import every_isa, use_isa

__all__ = ["LAYOUTS", "assert_within_budget", "cache_views", "doubles", "every_isa", "poisoned_storage",
           "rotary_table", "same_bits", "use_isa"]
