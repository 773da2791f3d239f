"""The cases of experts and router, as launched.py has those of the other nouns."""

from collections.abc import Iterator

import torch

from dflash_kernels.limits import MAX_EXPERTS

from .launched import DTYPES, FLOATS, Case, case, empty, launches
from .products import products

EXPERTS, CHOSEN, HIDDEN, INNER = 256, 8, 3072, 1536  # as MiniMax-M2 has them
FEW = 3  # experts, so few that each has many rows of a small batch


def floats(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.float32)


def experts() -> Iterator[Case]:
    """Tiles of 16 rows and of 32, which gate_up finds itself of few pairs, and reads of many."""
    from dflash_kernels._triton.experts import expert_mlp, rows_of_tile

    def launched(rows: int, count: int, dtype: torch.dtype, weight: torch.dtype, activation: int):
        def scales(n: int) -> torch.Tensor | None:
            return floats(count, n) if weight == torch.int8 else None

        x = empty(rows, HIDDEN, dtype=dtype)
        return launches(
            expert_mlp, x, empty(count, 2 * INNER, HIDDEN, dtype=weight), empty(count, HIDDEN, INNER, dtype=weight),
            scales(2 * INNER), scales(HIDDEN), empty(rows, CHOSEN, dtype=torch.int32), floats(rows, CHOSEN),
            empty(count, 2 * INNER, dtype=dtype), empty(count, HIDDEN, dtype=dtype), INNER, activation, 0, x)

    for name, dtype, weight in products():
        for rows, count in ((8, EXPERTS), (8, FEW), (512, EXPERTS), (1024, EXPERTS)):
            *schedule, gate_up, down = launched(rows, count, dtype, weight, 0)
            tile = rows_of_tile(rows * CHOSEN, count)
            yield case(f"expert_mlp gate_up {tile} {name}" + " scheduled" * len(schedule), gate_up)
            if schedule:
                yield case(f"expert_mlp down {tile} {name}", down)
            if schedule and weight == dtype == torch.float16:
                yield case(f"expert_mlp schedule {tile}", *schedule)
    yield case("expert_mlp gate_up 16 bf16 clamped", launched(8, EXPERTS, torch.bfloat16, torch.bfloat16, 1)[0])


def router() -> Iterator[Case]:
    from dflash_kernels._triton.router import route_experts

    bias, forms = floats(EXPERTS), {"softmax": (0, 1, 1, True), "softmax whole": (0, 1, 1, False),
                                    "sigmoid": (1, 1, 1, True), "groups": (1, 8, 4, True)}

    def launched(dtype: torch.dtype, count: int, bias: torch.Tensor | None, form: str) -> Case:
        scoring, groups, top_groups, normalize = forms[form]
        (launch,) = launches(route_experts, empty(9, count, dtype=dtype), bias, scoring, groups, top_groups, 2,
                             normalize, 1.0, empty(9, CHOSEN, dtype=torch.int32), floats(9, CHOSEN))
        return case(f"route_experts {count} {form} {DTYPES[dtype]}", launch)

    for form in forms:
        yield launched(torch.bfloat16, EXPERTS, None if "softmax" in form else bias, form)
    for dtype in FLOATS:
        yield launched(dtype, MAX_EXPERTS, None, "softmax")
