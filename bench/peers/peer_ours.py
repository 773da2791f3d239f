"""Our loop, as in `dflash-kernels bench decode`."""

import torch

import dflash_kernels
from bench.peers.job import BASELINE, Job, Question, Reply, accepted_drafts, serve
from bench.peers.watched_step import watch
from dflash_decode.session import NONE, Session


def load(job: Job):
    torch.set_num_threads(job.threads)
    baseline = job.mode == BASELINE
    session = Session.load(job.model, NONE if baseline else job.draft, dtype=job.dtype, weights=job.weights,
                           block_size=None if baseline or job.adapts else job.block_size)

    def answering(asked: Question) -> Reply:
        run = session.run(asked.prompts, max_tokens=asked.max_tokens, concurrency=asked.concurrency)
        tokens = [answer.tokens for answer in run.answers]
        if baseline:
            return Reply(run.seconds, [*map(len, tokens)], tokens)
        return Reply(run.seconds, [*map(len, tokens)], tokens, [len(answer.steps) for answer in run.answers],
                     accepted_drafts(run.steps, session.block_size))

    info = dflash_kernels.build_info()
    return answering, {"dflash-kernels": info["version"], "torch": info["torch"], "isa": info["isa"]}, watch


if __name__ == "__main__":
    serve(load)
