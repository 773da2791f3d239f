"""Hugging Face transformers, greedy baseline decoding."""

import time
from importlib.metadata import version

import torch
import transformers

from bench.peers.job import Job, Question, Reply, serve
from bench.peers.passes import VERIFY, Passes


def load(job: Job):
    torch.set_num_threads(job.threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype)).eval()

    @torch.inference_mode()
    def answering(asked: Question) -> Reply:
        began, tokens = time.perf_counter(), []
        for prompt in asked.prompts:
            ids = torch.tensor([prompt])
            found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked.max_tokens,
                                   do_sample=False, eos_token_id=job.stop_ids, pad_token_id=job.stop_ids[0])
            tokens.append(found[0, len(prompt):].tolist())
        return Reply(time.perf_counter() - began, [*map(len, tokens)], tokens)

    def watch(passes: Passes) -> None:
        model.forward = passes.part(VERIFY, model.forward, opens=True)

    return answering, {name: version(name) for name in ("transformers", "torch")}, watch


if __name__ == "__main__":
    serve(load)
