"""MiniMax-M2.7 and NVIDIA's drafter for it, of random weights: `python -m bench.minimax --layers 2 --experts 64`.

All widths are those of the published models; layers and experts are as many as memory holds (a layer of 256 experts has
7.2 GB in bfloat16). The drafter's features are then those of the layers that are there. Says what loading takes in
seconds and memory, and compares greedy output with and without the drafter.
"""

import argparse
import time
from pathlib import Path

import torch

from bench.published import entries
from bench.random_model import Tensors, random_on
from dflash_decode.loop import Decoder
from dflash_decode.model.config import read_draft_config
from dflash_decode.model.drafter import Drafter, tensor_shapes
from dflash_decode.model.native import NativeTarget
from dflash_decode.requests import Request

NAME, HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, INNER = "nvidia/MiniMax-M2.7-DFlash", 3072, 200064, 48, 8, 128, 1536


def config(layers: int, experts: int) -> dict:
    return {"model_type": "minimax_m2", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB,
            "max_position_embeddings": 196608, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "rotary_dim": 64,
            "num_local_experts": experts, "num_experts_per_tok": 8, "scoring_func": "sigmoid", "use_qk_norm": True,
            "use_routing_bias": True}


def target_shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        attention = {"q_proj": (q, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, q),
                     "q_norm": (q,), "k_norm": (kv,)}
        found = {f"self_attn.{name}": shape for name, shape in attention.items()}
        found |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
                  "block_sparse_moe.gate": (experts, HIDDEN)}
        for e in range(experts):
            for part, shape in (("w1", (INNER, HIDDEN)), ("w3", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER))):
                found[f"block_sparse_moe.experts.{e}.{part}"] = shape
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in found.items()}
        shapes[f"model.layers.{i}.block_sparse_moe.e_score_correction_bias"] = (experts,)
    return shapes


def resident() -> float:
    """GB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e9


def text_of(target: NativeTarget, drafter: Drafter | None, tokens: int) -> tuple[list[int], float]:
    """The answer, and seconds a step, without the first of each size."""
    decoder = Decoder(target, drafter, block_size=drafter.block_size if drafter else None, max_batch=1, max_context=256)
    decoder.submit(Request(0, list(range(100, 116)), tokens))
    found: list[int] = []
    seconds = []
    while len(found) < tokens:
        started = time.perf_counter()
        for event in decoder.step():
            found += event.tokens
        seconds.append(time.perf_counter() - started)
    return found, min(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12)
    asked = parser.parse_args()
    make, before, started = random_on("cpu", torch.bfloat16), resident(), time.perf_counter()
    sizes = asked.layers, asked.experts
    target = NativeTarget(config(*sizes), Tensors(target_shapes(*sizes), make), dtype=torch.bfloat16)
    print(f"target: {asked.layers} layers of {asked.experts} experts, {time.perf_counter() - started:.1f} s, "
          f"{resident() - before:.2f} GB", flush=True)
    read = read_draft_config(next(entry["config"] for entry in entries() if entry["name"] == NAME) | {
        "num_target_layers": asked.layers,
        "dflash_config": {"mask_token_id": 200054, "target_layer_ids": list(range(asked.layers))}})
    for int8 in (False, True):
        before, started = resident(), time.perf_counter()
        drafter = Drafter(read, Tensors(tensor_shapes(read), make), target, int8=int8)
        print(f"drafter in {'8' if int8 else '16'} bits: {time.perf_counter() - started:.1f} s, "
              f"{resident() - before:.2f} GB, drafts the first {drafter.num_valid} tokens", flush=True)
        if not int8:
            del drafter
    baseline, step = text_of(target, None, asked.tokens)
    text, drafted = text_of(target, drafter, asked.tokens)
    print(f"baseline step {step * 1e3:.1f} ms, step with a draft of {drafter.block_size} {drafted * 1e3:.1f} ms, "
          f"identical output: {'yes' if text == baseline else 'NO'}; {resident():.2f} GB in all")


if __name__ == "__main__":
    main()
