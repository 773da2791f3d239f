"""What the steps of a decoder take by part, seen from outside: the calls of its passes are timed where it keeps them.

Standard library only: every peer's environment runs it. For decoders that compute before a call returns: on a CPU.
"""

import time
from collections.abc import Callable
from functools import wraps

DRAFT, VERIFY = "draft", "verify"


class Passes:
    """steps: the seconds of each finished step, "step" in all and of its parts, "draft" and "verify".

    A step goes from where a target pass begins to where the next one does. So what the host does between passes is in
    it, whoever's loop it is, and the pass over a prompt, with the first draft after it, is none.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.steps: list[dict[str, float]] = []
        self._clock, self._inside = clock, False
        self.prompt()

    def prompt(self) -> None:
        """A prompt comes next: what is open is no step, and neither is its pass."""
        self._began, self._parts, self._of_prompt = None, {}, True

    def part(self, name: str, function: Callable, opens: bool = False) -> Callable:
        """The function, timed as this part wherever it is not called by another part. opens: it begins a target
        pass."""
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
        """The steps since it was last asked."""
        found, self.steps = self.steps, []
        return found
