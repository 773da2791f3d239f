"""Acceptance from what a server's /metrics counts: vLLM's and llama.cpp's counters, SGLang's, or SGLang's gauge."""

import re
from dataclasses import dataclass

_LINE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>[^\s]+)")
_POSITION = re.compile(r'position="(\d+)"')
_DRAFTS, _ACCEPTED = "spec_decode_num_drafts", "spec_decode_num_accepted_tokens"


@dataclass(frozen=True)
class Drafting:
    """drafts: blocks that the target checked; accepted: draft tokens that it took; by_position: of them at each
    position of the block. gauge: an acceptance length that the server averaged itself, over a stretch that it chose."""

    source: str
    drafts: float = 0.0
    accepted: float = 0.0
    by_position: tuple[float, ...] = ()
    gauge: float | None = None

    @property
    def length(self) -> float | None:
        """Tokens that a step committed, the target's own one included; None where nothing was drafted."""
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
    """(name, labels, value) of each sample of Prometheus' text format, names without _total."""
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
    """What /metrics says of drafting since the server started, over all of its engines; None where it says nothing."""
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
