"""Times the parts of a decoder's steps from outside, by wrapping the calls of its passes.

It uses only the standard library, because every peer's environment runs it. It suits decoders whose computation ends
before a call returns, as on a CPU.
"""

import time
from collections.abc import Callable
from functools import wraps

DRAFT, VERIFY = "draft", "verify"


class Passes:
    """steps: the seconds of each finished step, "step" in all and its parts "draft" and "verify".

    A step lasts from the start of one target pass to the start of the next, so it includes the host's work between
    passes. The pass over a prompt, with the first draft after it, is not a step.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.steps: list[dict[str, float]] = []
        self._clock, self._inside = clock, False
        self.prompt()

    def prompt(self) -> None:
        """Announces a prompt: the open interval and the prompt's pass are not steps."""
        self._began, self._parts, self._of_prompt = None, {}, True

    def part(self, name: str, function: Callable, opens: bool = False) -> Callable:
        """The function, timed as this part unless another part calls it. opens: whether it starts a target pass."""
        @wraps(function)
        def timed(*args, **kwargs):
            if self._inside:
                return function(*args, **kwargs)
            began = self._clock()
            if opens:
                self._turn(began)
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self._parts[name] = self._parts.get(name, 0.0) + self._clock() - began

        return timed

    def _turn(self, now: float) -> None:
        if self._began is not None:
            if not self._of_prompt:
                self.steps.append({"step": now - self._began, **self._parts})
            self._of_prompt = False
        self._began, self._parts = now, {}

    def taken(self) -> list[dict[str, float]]:
        """The steps since the last call."""
        found, self.steps = self.steps, []
        return found
