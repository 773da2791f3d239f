"""The authors' reference: dflash.model.dflash_generate over transformers."""

import time
from importlib.metadata import version

import dflash.model as reference
import torch
import transformers
from job import DFLASH, Answer, Job, accepted_drafts, serve


def load(job: Job):
    torch.set_num_threads(job.threads)
    transformers.utils.logging.disable_progress_bar()
    target = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16).eval()
    # Its statistics ask CUDA for the time, also on a CPU.
    reference._cuda_time = time.perf_counter
    if job.mode == DFLASH:
        drafter, block_size = reference.DFlashDraftModel.from_pretrained(job.draft, dtype=torch.bfloat16).eval(), None
        if drafter.block_size != job.block_size:
            block_size = job.block_size
    else:  # a block of one token needs no drafter: its loop is plain decoding then, but asks for these two
        drafter, block_size = _NoDrafter(target), 1

    def answering(prompts, max_new_tokens):
        return [answer(prompt, max_new_tokens) for prompt in prompts]

    def answer(prompt, max_new_tokens):
        began = time.perf_counter()
        found = reference.dflash_generate(drafter, target, torch.tensor([prompt]), max_new_tokens, job.stop_ids,
                                          block_size=block_size, return_stats=True)
        seconds, tokens = time.perf_counter() - began, found.output_ids[0, len(prompt):].tolist()
        if job.mode != DFLASH:
            return Answer(tokens, seconds)
        steps = found.acceptance_lengths
        return Answer(tokens, seconds, len(steps), accepted_drafts(steps, job.block_size))

    return answering, {name: version(name) for name in ("dflash", "transformers", "torch")}


class _NoDrafter:
    def __init__(self, target):
        self.block_size, self.mask_token_id, self.config = 1, 0, target.config


if __name__ == "__main__":
    serve(load)
