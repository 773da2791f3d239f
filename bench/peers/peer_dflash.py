"""The authors' reference implementation: dflash.model.dflash_generate over transformers."""

import time
from importlib.metadata import version

import dflash.model as reference
import torch
import transformers

from bench.peers.job import Job, Question, Reply, accepted_drafts, serve
from bench.peers.passes import DRAFT, VERIFY, Passes


def load(job: Job):
    torch.set_num_threads(job.threads)
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, job.dtype)
    target = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()
    drafter = reference.DFlashDraftModel.from_pretrained(job.draft, dtype=dtype).eval()
    # Its statistics ask CUDA for the time, also on a CPU.
    reference._cuda_time = time.perf_counter

    def answering(asked: Question) -> Reply:
        began, tokens, steps, commits = time.perf_counter(), [], [], []
        for prompt in asked.prompts:
            found = reference.dflash_generate(drafter, target, torch.tensor([prompt]), asked.max_tokens,
                                              job.stop_ids, block_size=job.block_size, return_stats=True)
            tokens.append(found.output_ids[0, len(prompt):].tolist())
            steps.append(len(found.acceptance_lengths))
            commits += found.acceptance_lengths
        return Reply(time.perf_counter() - began, [*map(len, tokens)], tokens, steps,
                     accepted_drafts(commits, job.block_size))

    def watch(passes: Passes) -> None:
        target.forward = passes.part(VERIFY, target.forward, opens=True)
        drafter.forward = passes.part(DRAFT, drafter.forward)  # with the projected features and their keys and values
        drafter.compute_logits = passes.part(DRAFT, drafter.compute_logits)

    return answering, {name: version(name) for name in ("dflash", "transformers", "torch")}, watch


if __name__ == "__main__":
    serve(load)
