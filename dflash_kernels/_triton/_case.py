"""A kernel as one configuration compiles it: what `cases()` of a noun has, and tools/aot compiles."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One kernel as one configuration compiles it. signature has a type for each argument that is not a constexpr,
    "constexpr" for the others; options are the compiler's, such as enable_fp_fusion."""

    name: str
    kernel: Any
    signature: dict
    constexprs: dict
    num_warps: int
    num_stages: int
    options: dict = {}  # noqa: RUF012
