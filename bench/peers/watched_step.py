"""Times the parts of our loop's steps on a CPU, each of which is a stage of its own."""

import dflash_decode.packed_runner as packed_runner
from bench.peers.passes import DRAFT, VERIFY, Passes
from dflash_decode.packed import ContextStage, DraftStage, VerifyStage
from dflash_decode.step import Prefill


def watch(passes: Passes) -> None:
    """Times the steps of every decoder made from now on, on a CPU."""

    class WatchedVerify(VerifyStage):
        def __call__(self):
            return passes.part(VERIFY, super().__call__, opens=True)()

    class WatchedDraft(DraftStage):
        def __call__(self, *args):
            return passes.part(DRAFT, super().__call__)(*args)

    class WatchedContext(ContextStage):
        def __call__(self, *args):
            return passes.part(DRAFT, super().__call__)(*args)

    class WatchedPrefill(Prefill):
        def __call__(self, *args):
            passes.prompt()
            return passes.part(VERIFY, super().__call__, opens=True)(*args)

    for watched in (WatchedVerify, WatchedDraft, WatchedContext, WatchedPrefill):
        setattr(packed_runner, watched.__bases__[0].__name__, watched)
