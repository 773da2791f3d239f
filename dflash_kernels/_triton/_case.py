"""A kernel as one configuration compiles it: what `cases()` of a noun has, and tools/aot compiles."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One kernel as one configuration compiles it. signature has a type for each argument that is not a constexpr,
    "constexpr" for the others; options are the compiler's, such as enable_fp_fusion. A constexpr, num_warps and
    num_stages may be functions of the architecture."""

    name: str
    kernel: Any
    signature: dict
    constexprs: dict
    num_warps: int | Callable[[int], int]
    num_stages: int | Callable[[int], int]
    options: dict = {}  # noqa: RUF012

    def on(self, arch: int) -> "Case":
        """As `arch` has it."""
        def value(x):
            return x(arch) if callable(x) else x

        return self._replace(constexprs={n: value(x) for n, x in self.constexprs.items()},
                             num_warps=value(self.num_warps), num_stages=value(self.num_stages))
