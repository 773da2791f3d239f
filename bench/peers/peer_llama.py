"""llama.cpp through llama-cpp-python: plain decoding of the GGUF file as it is, 4 bits."""

import time

import llama_cpp
import numpy as np
from job import Answer, Job, serve


def load(job: Job):
    longest = max(map(len, job.prompts)) + job.max_new_tokens
    llm = llama_cpp.Llama(job.model, n_ctx=longest, n_threads=job.threads, n_threads_batch=job.threads, verbose=False)
    stops = set(job.stop_ids)

    def answering(prompts, max_new_tokens):
        return [answer(prompt, max_new_tokens) for prompt in prompts]

    def answer(prompt, max_new_tokens):
        began, tokens = time.perf_counter(), []
        llm.reset()
        llm.eval(prompt)
        while True:
            # Its own sampler builds an array of candidates first; this is what greedy decoding needs and no more.
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),))
            tokens.append(int(logits.argmax()))
            if tokens[-1] in stops or len(tokens) == max_new_tokens:
                return Answer(tokens, time.perf_counter() - began)
            llm.eval(tokens[-1:])

    return answering, {"llama-cpp-python": llama_cpp.__version__}


if __name__ == "__main__":
    serve(load)
