"""What chooses the drafts of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .lookup import Draft

FIRST_WAIT = 4  # steps until the first trial of a request that does not draft


class Policy(Protocol):
    """`WidthPolicy` (widths.py) follows measured costs; an engine, or a test, can have another."""

    def looks_up(self, requests: int) -> bool:
        """Whether the next step is to look drafts up in the texts themselves."""

    def rests(self, requests: int) -> bool:
        """Whether the next step has no drafts. Nothing is chosen for it then."""

    def to_draft(self, requests: Sequence["Outlook"], found: Sequence[Draft]) -> tuple[list[int], int]:
        """Indices of the requests that the drafter drafts for in this step, and the tokens of their blocks, each anchor
        included. found: the drafts from each request's own text; none where there are none."""

    def choose(self, requests: Sequence["Outlook"], drafted: Sequence[Draft], found: Sequence[Draft],
               limits: Sequence[int], together: bool = False) -> list[Draft]:
        """The drafts of each request to verify, fewer than its limit: the first ones of those that the drafter made, or
        of those that were found. together: all blocks of a step cost what the longest one does.
        """

    def took(self, part: str, size: int, seconds: float) -> None:
        """Tells what a verify pass (part "verify") or a draft (part "draft") of so many rows took, for how many
        requests the drafter's context was brought up to date before that in which time (part "context"), and for how
        many the drafts of a step were looked up and chosen (part "choice")."""

    def verified(self, requests: Sequence["Outlook"], drafts: Sequence[Draft], accepted: Sequence[int]) -> None:
        """Tells how many of the drafts that were verified of each request were accepted."""


@dataclass
class Outlook:
    """What a policy remembers of one request. worth: of drafts of each length for it, in tokens a step; None: as of
    all. idle: steps since it drafted, but for those that rested. wait: after which it is tried again beside others.
    paid: whether its last drafts did."""

    worth: list[float] | None = None
    idle: int = 0
    wait: int = FIRST_WAIT
    paid: bool = True


class FixedWidths:
    """The same width for every block, all of whose drafts are the drafter's: what a named block_size means.

    block: the tokens of a block.
    """

    def __init__(self, block: int):
        self.block = block

    def looks_up(self, requests: int) -> bool:
        return False

    def rests(self, requests: int) -> bool:
        return self.block == 1

    def to_draft(self, requests: Sequence[Outlook], found: Sequence[Draft]) -> tuple[list[int], int]:
        return list(range(len(requests))), self.block

    def choose(self, requests: Sequence[Outlook], drafted: Sequence[Draft], found: Sequence[Draft],
               limits: Sequence[int], together: bool = False) -> list[Draft]:
        return [draft.cut(limit - 1) for draft, limit in zip(drafted, limits, strict=True)]

    def took(self, part: str, size: int, seconds: float) -> None:
        pass

    def verified(self, requests: Sequence[Outlook], drafts: Sequence[Draft], accepted: Sequence[int]) -> None:
        pass
