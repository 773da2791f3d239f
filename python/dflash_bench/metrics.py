"""Reads acceptance from a server's /metrics: counters of vLLM, llama.cpp and SGLang, or SGLang's gauge."""

import re
from dataclasses import dataclass

_LINE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>[^\s]+)")
_POSITION = re.compile(r'position="(\d+)"')
_DRAFTS, _ACCEPTED = "spec_decode_num_drafts", "spec_decode_num_accepted_tokens"


@dataclass(frozen=True)
class Drafting:
    """Draft counters of a server.

    drafts: verified blocks.
    accepted: accepted draft tokens.
    by_position: accepted draft tokens by position in the block.
    gauge: an acceptance length that the server averaged over a period of its choice.
    """

    source: str
    drafts: float = 0.0
    accepted: float = 0.0
    by_position: tuple[float, ...] = ()
    gauge: float | None = None

    @property
    def length(self) -> float | None:
        """The acceptance length: tokens committed per step, including the target's own; None if nothing was drafted."""
        if self.gauge is not None:
            return self.gauge or None
        return 1 + self.accepted / self.drafts if self.drafts else None

    def __sub__(self, before: "Drafting") -> "Drafting":
        return self._with(before, -1)

    def __add__(self, other: "Drafting") -> "Drafting":
        return other._with(self, 1)  # a gauge cannot be added: the later one counts

    def _with(self, other: "Drafting", sign: int) -> "Drafting":
        width = max(len(self.by_position), len(other.by_position))
        mine, theirs = ([*d.by_position, *[0.0] * (width - len(d.by_position))] for d in (self, other))
        return Drafting(self.source, self.drafts + sign * other.drafts, self.accepted + sign * other.accepted,
                        tuple(a + sign * b for a, b in zip(mine, theirs, strict=True)), self.gauge)


def samples(text: str) -> list[tuple[str, str, float]]:
    """(name, labels, value) of each sample in Prometheus' text format, with names without _total."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            try:
                found.append((match["name"].removesuffix("_total"), match["labels"] or "", float(match["value"])))
            except ValueError:
                continue
    return found


def drafting(text: str) -> Drafting | None:
    """The draft counters since the server started, over all its engines; None if there are none."""
    found = samples(text)

    def total(name: str) -> float | None:
        values = [value for n, _, value in found if n == name]
        return sum(values) if values else None

    for engine in dict.fromkeys(name.split(":")[0] for name, _, _ in found if name.endswith(f":{_DRAFTS}")):
        drafts, accepted = (total(f"{engine}:{name}") or 0.0 for name in (_DRAFTS, _ACCEPTED))
        positions: dict[int, float] = {}
        for name, labels, value in found:
            where = _POSITION.search(labels) if name == f"{engine}:{_ACCEPTED}_per_pos" else None
            if where:
                positions[int(where[1])] = positions.get(int(where[1]), 0.0) + value
        return Drafting(f"{engine} counters", drafts, accepted, tuple(positions[k] for k in sorted(positions)))
    calls, tokens = total("sglang:spec_verify_calls"), total("sglang:generation_tokens")
    if calls is not None and tokens is not None:
        # A request's first token comes from its prompt's pass, one of each verified block from the target itself.
        return Drafting("sglang counters", calls, tokens - (total("sglang:num_requests") or 0.0) - calls)
    gauges = [value for name, _, value in found if name == "sglang:spec_accept_length"]
    return Drafting("sglang gauge, its last interval", gauge=max(gauges)) if gauges else None
