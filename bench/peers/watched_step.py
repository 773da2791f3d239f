"""Times the parts of our loop's steps on a CPU, each of which is a stage of its own."""

from bench.peers.passes import DRAFT, VERIFY, Passes
from dflash_decode.packed import ContextStage, DraftStage, VerifyStage
from dflash_decode.step import Prefill

STAGES = {VerifyStage: VERIFY, DraftStage: DRAFT, ContextStage: DRAFT, Prefill: VERIFY}


def watch(passes: Passes) -> None:
    """Times the steps of every decoder from now on, on a CPU."""
    for stage, part in STAGES.items():
        stage.__call__ = _timed(passes, stage, part)


def _timed(passes: Passes, stage: type, part: str):
    inner = stage.__call__

    def call(self, *args):
        if stage is Prefill:
            passes.prompt()
        return passes.part(part, inner, opens=part == VERIFY)(self, *args)

    return call
