"""What a policy of widths expected of its steps, and what they brought: how good its choices can be."""

from dataclasses import dataclass


@dataclass
class Forecast:
    """Sums over steps: tokens of all requests, and seconds of drafts and verify passes."""

    steps: int = 0
    expected_tokens: float = 0.0
    tokens: int = 0
    expected_seconds: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Forecast") -> "Forecast":
        return Forecast(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: "Forecast") -> "Forecast":
        return Forecast(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))
