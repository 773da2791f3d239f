"""Times the parts of our loop's steps: a step's recording is cut between its parts, and the pieces are timed."""

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace

import dflash_decode.loop as loop
from bench.peers.passes import DRAFT, VERIFY, Passes
from dflash_decode.step import Prefill, Step
from dflash_kernels import StepGraph


class Pieces:
    """Replaces a step's single recording. records: False where the step is called instead of replayed."""

    def __init__(self, passes: Passes, records: bool):
        self.passes, self.records, self.replays, self._capture = passes, records, [], ExitStack()

    def done(self, work: Callable[[], None]) -> None:
        if self.replays:
            for replay in self.replays:
                replay()
        elif self.records:
            with self._capture:
                self._cut()
                work()
        else:
            work()

    def part(self, name: str, function: Callable, opens: bool = False) -> Callable:
        """The function, recorded as a piece of its own."""
        timed = self.passes.part(name, function, opens)

        def piece(*args):
            if not self.records:
                return timed(*args)
            graph = self._cut()
            self.replays[-1] = self.passes.part(name, graph.replay, opens)
            found = timed(*args)
            self._cut()
            return found

        return piece

    def _cut(self) -> StepGraph:
        """Ends the current piece and begins another."""
        self._capture.close()
        graph = StepGraph()
        self._capture.enter_context(graph.capture())
        self.replays.append(graph.replay)
        return graph


def watch(passes: Passes) -> None:
    """Times the steps of every decoder made from now on, on a CPU."""
    loop.Step, loop.Prefill = steps_of(passes)


def steps_of(passes: Passes) -> tuple[type[Step], type[Prefill]]:
    class WatchedStep(Step):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.work = pieces = Pieces(passes, self.work.graph is not None)
            self.forward.run = pieces.part(VERIFY, self.forward.run, opens=True)
            self.verifier.target = SimpleNamespace(next_ids=pieces.part(VERIFY, self.target.next_ids))
            for each in filter(None, (self.draft, self.context)):
                each.run = pieces.part(DRAFT, each.run)

    class WatchedPrefill(Prefill):
        def __call__(self, *args):
            passes.prompt()
            return passes.part(VERIFY, super().__call__, opens=True)(*args)

    return WatchedStep, WatchedPrefill
