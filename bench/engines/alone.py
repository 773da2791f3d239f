"""Times the drafter's context K/V and attention in a loop, at the sizes of SmolLM2's drafter: the engine's and ours.

    python -m bench.engines.alone reply.json

It runs in the engine's environment with our wheel on its path. No model is loaded, and the plugin replaces nothing.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, _get_attn_isa

from dflash_engines.vllm import context
from dflash_engines.vllm.attention_backend import DFlashAttention, DFlashAttentionBackend, DFlashMetadata

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, PAGE, PAGES, WIDTH = 3, 9, 3, 64, 576, 128, 300, 8
CALLS = 300
ISA = _get_attn_isa(torch.bfloat16, PAGE, DIM, "auto")


def layer(ours: bool) -> SimpleNamespace:
    if ours:
        impl = object.__new__(DFlashAttention)
        DFlashAttention.__init__(impl, HEADS, DIM, DIM ** -0.5, KV_HEADS)
    else:
        impl = object.__new__(CPUAttentionBackendImpl)
        vars(impl).update(scale=DIM ** -0.5, attn_type="decoder", kv_cache_dtype="auto", alibi_slopes=None,
                          sliding_window=-1, logits_soft_cap=0, sinks=None)
    return SimpleNamespace(
        impl=impl, isa=ISA, _k_scale_float=1.0, _v_scale_float=1.0,
        kv_cache=torch.zeros(PAGES, KV_HEADS, PAGE, 2 * DIM, dtype=torch.bfloat16),
        attn_backend=DFlashAttentionBackend if ours else CPUAttentionBackend)


def model(layers: list[SimpleNamespace]) -> DFlashQwen3Model:
    """The parts of a model that its precomputation of the context K/V reads."""
    made = object.__new__(DFlashQwen3Model)
    torch.nn.Module.__init__(made)
    angles = torch.arange(8192)[:, None] / 1e5 ** (torch.arange(DIM // 2) / (DIM // 2))
    vars(made).update(
        _num_attn_layers=LAYERS, _num_kv_heads=KV_HEADS, _head_dim=DIM, _kv_size=KV_HEADS * DIM,
        _hidden_norm_weight=torch.randn(HIDDEN).bfloat16(), _k_norm_weights=torch.randn(LAYERS, DIM).bfloat16(),
        _fused_kv_weight=torch.randn(LAYERS * 2 * KV_HEADS * DIM, HIDDEN).bfloat16(), _fused_kv_bias=None,
        _rms_norm_eps=1e-5, _rope_head_size=DIM, _rope_is_neox=True, _attn_layers=layers,
        _rope_cos_sin_cache=torch.cat([angles.cos(), angles.sin()], -1).bfloat16(),
        layers=[SimpleNamespace(self_attn=SimpleNamespace(v_scale=None))],
        vllm_config=SimpleNamespace(speculative_config=SimpleNamespace(method="dflash")))
    return made


def medians(calls: dict) -> dict[str, float]:
    """Median microseconds of each function, called in turn."""
    seconds = {way: [] for way in calls}
    for number in range(CALLS + 20):
        for way, call in calls.items():
            began = time.perf_counter()
            call()
            if number >= 20:
                seconds[way].append(time.perf_counter() - began)
    return {way: round(1e6 * statistics.median(found), 1) for way, found in seconds.items()}


def context_kv(tokens: int) -> dict:
    theirs = DFlashQwen3Model.precompute_and_store_context_kv
    replacement = context.precompute_and_store_context_kv
    on_cpu, on_pages = (model([layer(ours) for _ in range(LAYERS)]) for ours in (False, True))
    states, positions = torch.randn(tokens, HIDDEN).bfloat16(), torch.arange(tokens) + 100
    slots = torch.arange(tokens) + PAGE
    return {"tokens": tokens, "us": medians({
        "without": lambda: theirs(on_cpu, states, positions, slots),
        "with": lambda: replacement(on_cpu, states, positions, slots),
        "attention": lambda: replacement(on_pages, states, positions, slots)})}


def attend(requests: int, length: int) -> dict:
    """One layer of a draft pass. The engine first writes the block's K/V into the cache."""
    theirs, ours, pages = layer(False), layer(True), -(-(length + WIDTH) // PAGE)
    table = torch.arange(requests * pages, dtype=torch.int32).view(requests, pages)
    slots = (table.long()[..., None] * PAGE + torch.arange(PAGE)).flatten(1)
    lens = torch.full((requests,), length, dtype=torch.int32)
    q, k, v, cached_k, cached_v = (torch.randn(requests * n, heads, DIM).bfloat16() for n, heads in (
        (WIDTH, HEADS), (WIDTH, KV_HEADS), (WIDTH, KV_HEADS), (length, KV_HEADS), (length, KV_HEADS)))
    for one in (theirs, ours):
        one.impl.do_kv_cache_update(one, cached_k, cached_v, one.kv_cache, slots[:, :length].flatten())
    starts = torch.arange(requests + 1, dtype=torch.int32) * WIDTH
    common = {"seq_lens": lens + WIDTH, "query_start_loc": starts, "causal": False, "dynamic_causal": None}
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=requests, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.bfloat16, isa=ISA,
        sliding_window_size=-1, enable_kv_split=True, kv_cache_dtype="auto", **common)
    made = SimpleNamespace(num_actual_tokens=len(q), block_table=table, scheduler_metadata=plan, **common)
    outs = [torch.empty_like(q) for _ in range(2)]
    mine = DFlashMetadata(False, WIDTH, lens + WIDTH, lens, table, starts)
    new = slots[:, length:length + WIDTH].flatten()

    def engine():
        theirs.impl.do_kv_cache_update(theirs, k, v, theirs.kv_cache, new)
        theirs.impl.forward(theirs, q, k, v, theirs.kv_cache, made, outs[0])

    found = medians({"without": engine, "attention": lambda: ours.impl.forward(
        ours, q, k, v, ours.kv_cache, mine, outs[1])})
    torch.testing.assert_close(*outs, atol=0.01, rtol=0.02)
    return {"requests": requests, "context": length, "us": found}


def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        found = {"isa": ISA, "context_kv": [context_kv(tokens) for tokens in (1, 8, 64)],
                 "attention": [attend(*size) for size in ((1, 64), (1, 500), (1, 1000), (4, 500), (32, 200))]}
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
