"""llama.cpp through xllamacpp: the GGUF file as it is, 4 bits, one request at a time, with its own DFlash where there
is a drafter.

The wheel's llama.cpp is built for AVX2: it has no code for AVX-512 or AMX.
"""

import time
from importlib.metadata import version

import xllamacpp
from job import DFLASH, Job, Question, Reply, serve

WHOLE = "it tells the time of an answer only, of which a step is the mean"


def load(job: Job):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = job.model, job.longest + job.block_size, 1
    pools = [params.cpuparams, params.cpuparams_batch]
    if job.mode == DFLASH:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH]
        draft = params.speculative.draft
        draft.mparams.path, draft.n_max = job.draft, job.block_size - 1
        pools += [draft.cpuparams, draft.cpuparams_batch]
    for pool in pools:
        pool.n_threads = job.threads
    server = xllamacpp.Server(params)

    def answering(asked: Question) -> Reply:
        began, counts, steps, parts = time.perf_counter(), [], [], []
        for prompt in asked.prompts:
            found = server.handle_completions({"prompt": prompt, "n_predict": asked.max_new_tokens, "temperature": 0.0,
                                               "cache_prompt": False})
            if "usage" not in found:
                raise ValueError(f"llama.cpp refuses: {found}")
            counts.append(found["usage"]["completion_tokens"])
            # It tells no steps: each gives one token more than it accepts, and the first token is the prompt's.
            timings = found["timings"]
            steps.append(counts[-1] - 1 - timings.get("draft_n_accepted", 0))
            if steps[-1]:  # its clock for new tokens starts where the prompt's first one is there
                parts += [{"step": timings["predicted_ms"] / 1e3 / steps[-1]}] * steps[-1]
        return Reply(time.perf_counter() - began, counts, steps=steps if job.mode == DFLASH else [],
                     **({"parts": parts, "whole": WHOLE} if asked.watched else {}))

    return answering, {"xllamacpp": version("xllamacpp"), "llama.cpp": xllamacpp.get_system_info().strip(" |\n")}, None


if __name__ == "__main__":
    serve(load)
