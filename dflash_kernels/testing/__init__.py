"""Tools for testing kernels against a reference: error budgets, poisoned memory and instruction sets.

`LAYOUTS` names the cache layouts that `poisoned_storage` and `cache_views` know: "nhd", "hnd", "interleaved", "slots".
"""

from .budget import assert_within_budget, doubles, same_bits
from .cache import LAYOUTS, cache_views, poisoned_storage, rotary_table
from .isa import every_isa, use_isa

__all__ = ["LAYOUTS", "assert_within_budget", "cache_views", "doubles", "every_isa", "poisoned_storage",
           "rotary_table", "same_bits", "use_isa"]
