"""A mixture of experts: expert_mlp at the sizes of MiniMax-M2.7's and Qwen3-Coder-30B-A3B's layers, and their routers.

Routing is random, as if each row chose freely, or skewed: some experts are likelier for all rows, so that they have
many. Each copy of a case has its own, and a case's bytes are the mean over its copies of the experts that were really
chosen. On a CPU a layer of MiniMax-M2.7 has 64 of its 256 experts, to fit in memory: more rows share an expert than
would among 256.
"""

import importlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes, agreeing

# hidden, inner, experts of the router, experts that are stored, chosen
MINIMAX, QWEN = (3072, 1536, 256, 64, 8), (2048, 768, 128, 128, 8)
GEOMETRIES = {"cpu": {"minimax-m2.7": MINIMAX, "qwen3-coder-30b-a3b": QWEN},
              "cuda": {"minimax-m2.7": (3072, 1536, 256, 256, 8), "qwen3-coder-30b-a3b": QWEN},
              "tiny": {"tiny": (32, 24, 8, 6, 2)}}
ROWS = {"cpu": (1, 8, 16, 64), "cuda": (1, 8, 16, 64), "tiny": (3,)}
ROUTINGS, COPIES = {"random": 0.0, "skewed": 2.0}, 4


def cases(sizes: Sizes):
    for name, (hidden, inner, experts, stored, chosen) in GEOMETRIES[sizes.name].items():
        for rows in ROWS[sizes.name]:
            yield router_case(sizes, name, rows, experts, chosen)
        plain = weights_of(sizes, stored, hidden, inner)
        packed = [dk.pack_experts(w) for w in plain]
        for routing, skew in ROUTINGS.items():
            for rows in ROWS[sizes.name]:
                yield experts_case(sizes, f"{name}, {stored} experts, {routing}", rows, skew, chosen, plain, packed)
        plain = [Eight(w) for w in plain]
        packed = [dk.pack_experts(w.quantized, w.scales) for w in plain]
        for rows in ROWS[sizes.name][:2]:
            yield experts_case(sizes, f"{name}, {stored} experts in 8 bits, random", rows, 0.0, chosen, plain, packed)


def weights_of(sizes, experts, hidden, inner):
    """Experts that are all one another's rows in another order: random numbers take longer than the benchmark."""
    def made(n, k):
        one = sizes.random(n, k) / k**0.5
        weights = torch.empty(experts, n, k, dtype=sizes.dtype)
        for e in range(experts):
            weights[e] = one.roll(e, 0)
        return weights
    return made(2 * inner, hidden), made(hidden, inner)


class Eight:
    """Weights in 8 bits, an expert of which is float32."""

    def __init__(self, weights):
        pairs = [dk.quantize_weight(w) for w in weights]
        self.quantized, self.scales = (torch.stack(found) for found in zip(*pairs, strict=True))
        self.shape = weights.shape

    def __getitem__(self, e):
        return self.quantized[e] * self.scales[e, :, None]


def routes_of(rows, experts, chosen, skew):
    """ids and weights of COPIES calls, the same each time; skew: standard deviations by which experts differ for all
    rows."""
    drawn = torch.Generator(torch.get_default_device()).manual_seed(0)
    return [dk.route_experts(torch.randn(rows, experts, generator=drawn)
                             + skew * torch.randn(experts, generator=drawn), chosen) for _ in range(COPIES)]


def grouped(x, gate_up, down, ids, weights):
    """The rows of one expert after another, as transformers' own loop."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        rows, slots = torch.where(ids == e)
        gate, up = F.linear(x[rows], gate_up[e].to(x.dtype)).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down[e].to(x.dtype))
        out.index_add_(0, rows, (y * weights[rows, slots, None]).to(x.dtype))
    return (out,)


def experts_case(sizes, name, rows, skew, chosen, plain, packed):
    experts, hidden, inner = plain[1].shape
    eight = isinstance(plain[1], Eight)
    x, out = sizes.random(rows, hidden), torch.empty(rows, hidden, dtype=sizes.dtype)
    routes = routes_of(rows, experts, chosen, skew)
    read = sum(ids.unique().numel() for ids, _ in routes) / COPIES

    def run(i):
        return dk.expert_mlp(x, *packed, *routes[i], out=out)

    return Case("expert_mlp", f"{name}, {rows} rows", run,
                cost.experts_bytes(read, rows, hidden, inner, chosen, 2, packed[0].data.element_size()), COPIES,
                cost.experts_flops(rows, hidden, inner, chosen),
                peers_of(sizes.device, x, plain, routes) if sizes.peers else {},
                agreeing(lambda: grouped(x.float(), *plain, *routes[0]), lambda: grouped(x, *plain, *routes[0])),
                headline=rows == 8 and name.endswith("random") and not eight)


def peers_of(device, x, plain, routes):
    if device == "cuda":
        return {} if isinstance(plain[1], Eight) else {
            name: engine_s(name, x, plain, routes) for name in ENGINES}
    return cpu_peers_of(x, plain, routes)


# Where an engine is installed: the module, and the function of rows, weights of both products, and what was chosen.
ENGINES = {"vllm": ("vllm.model_executor.layers.fused_moe.fused_moe", "fused_experts_impl"),
           "sglang": ("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe", "fused_experts_impl")}


def engine_s(name, x, plain, routes):
    module, function = ENGINES[name]
    try:
        fused = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        return f"left out: {error}"
    routes = [(weights, ids.int()) for ids, weights in routes]
    return lambda i: (fused(x, *plain, *routes[i]),)


def cpu_peers_of(x, plain, routes):
    """Torch grouped by expert, and transformers' layer as it chooses for a model on a CPU."""
    found = {"torch": lambda i: grouped(x, *plain, *routes[i]),
             "torch.compile": "left out: the shapes of expert_mlp's expression depend on what was chosen"}
    if isinstance(plain[1], Eight):
        return found
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        return found | {"transformers": f"left out: {error}"}
    experts, hidden, inner = plain[1].shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        layer = Qwen3MoeExperts(config)
    layer.gate_up_proj, layer.down_proj = (torch.nn.Parameter(w, requires_grad=False) for w in plain)

    def theirs(i):
        ids, weights = routes[i]
        with torch.no_grad():
            return (layer(x, ids.long(), weights.to(x.dtype)),)

    return found | {"transformers": theirs}


def router_case(sizes, name, rows, experts, chosen):
    """As MiniMax-M2's: a sigmoid, with a bias in the choice."""
    moved = cost.route_bytes(rows, experts, chosen, 4)
    copies = sizes.copies_of(moved)
    logits, bias = torch.randn(copies, rows, experts), torch.randn(experts) * 0.1
    ids, weights = torch.empty(rows, chosen, dtype=torch.int32), torch.empty(rows, chosen)

    def run(i):
        return dk.route_experts(logits[i], chosen, bias=bias, scoring="sigmoid", out_ids=ids, out_weights=weights)

    def expression(x):
        scores = torch.sigmoid(x)
        found = torch.topk(scores + bias, chosen).indices
        shares = scores.gather(1, found)
        return found, shares / shares.sum(-1, keepdim=True)

    problem = SimpleNamespace(expression=expression, args=lambda i: (logits[i],))
    return Case("route_experts", f"{name}, {rows} rows", run, moved, copies,
                peers=sizes.peers_of("route_experts", problem),
                check=agreeing(lambda: expression(logits[0].double()), lambda: expression(logits[0])))
