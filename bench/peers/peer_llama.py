"""llama.cpp through xllamacpp: plain decoding of the GGUF file as it is, 4 bits, one request at a time.

The wheel's llama.cpp is built for AVX2: it has no code for AVX-512 or AMX.
"""

import time
from importlib.metadata import version

import xllamacpp
from job import Job, Question, Reply, serve


def load(job: Job):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = job.model, job.longest, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
    server = xllamacpp.Server(params)

    def answering(asked: Question) -> Reply:
        began, counts = time.perf_counter(), []
        for prompt in asked.prompts:
            found = server.handle_completions({"prompt": prompt, "n_predict": asked.max_new_tokens, "temperature": 0.0,
                                               "cache_prompt": False})
            if "usage" not in found:
                raise ValueError(f"llama.cpp refuses: {found}")
            counts.append(found["usage"]["completion_tokens"])
        return Reply(time.perf_counter() - began, counts)

    return answering, {"xllamacpp": version("xllamacpp"), "llama.cpp": xllamacpp.get_system_info().strip(" |\n")}


if __name__ == "__main__":
    serve(load)
