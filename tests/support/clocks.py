"""Clocks for tests of what is timed: none of them is the machine's."""


class Clock:
    """Tells what `work` has added up; nothing else takes time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


class Ticks:
    """A second passes each time it is asked."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now
