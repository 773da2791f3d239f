"""Us, as `dflash-kernels bench decode` runs."""

import time

import torch
from job import PLAIN, Answer, Job, accepted_drafts, serve

import dflash_kernels
from dflash_decode.session import NONE, Session


def load(job: Job):
    torch.set_num_threads(job.threads)
    plain = job.mode == PLAIN
    session = Session.load(job.model, NONE if plain else job.draft, block_size=None if plain else job.block_size)

    def answering(prompts, max_new_tokens):
        ends = {}

        def on_tokens(index, tokens):
            ends[index] = time.perf_counter()

        run = session.run(prompts, max_new_tokens=max_new_tokens, on_tokens=on_tokens)
        began, answers = time.perf_counter() - run.seconds, []
        for index, answer in enumerate(run.answers):
            drafted = () if plain else answer.steps
            answers.append(Answer(answer.tokens, ends[index] - began, len(drafted),
                                  [] if plain else accepted_drafts(drafted, session.block_size)))
            began = ends[index]
        return answers

    info = dflash_kernels.build_info()
    return answering, {"dflash-kernels": info["version"], "torch": info["torch"], "isa": info["isa"]}


if __name__ == "__main__":
    serve(load)
