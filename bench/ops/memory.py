"""The ops limited by memory: norms, activation, RoPE, context K/V, blocks, verification; against torch and, on a GPU,
the peers of bench/peers.

The geometries are those of the drafters of SmolLM2 (on a CPU) and Qwen3-8B, with few rows and many.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import dflash_kernels as dk
from bench import cost
from bench.case import Case, Sizes, agreeing
from dflash_kernels import reference

PAGE, EPS = 64, 1e-6
ROWS = {"cpu": (8, 64), "cuda": (64, 8192), "tiny": (3,)}
TOKENS = {"cpu": (64,), "cuda": (64, 4096), "tiny": (5,)}


@dataclass(frozen=True)
class Geometry:
    """A drafter's layers; requests of `block` tokens each."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    layers: int
    vocab: int
    requests: int
    block: int


SMOLLM2 = Geometry(576, 1536, 9, 3, 64, 3, 49152, 8, 8)
QWEN3_8B = Geometry(4096, 12288, 32, 8, 128, 5, 151936, 8, 16)
GEOMETRIES = {"cpu": {"smollm2": SMOLLM2, "qwen3-8b": QWEN3_8B}, "cuda": {"qwen3-8b": QWEN3_8B},
              "tiny": {"tiny": Geometry(64, 96, 4, 2, 64, 2, 100, 2, 4)}}
VERIFY_WIDTH = 8  # rows of logits of a request
CONV_BLOCK, CONV_TAPS, CONV_GROUP = 8, 2, 16


def cases(sizes: Sizes):
    for g in GEOMETRIES[sizes.name].values():
        for rows in ROWS[sizes.name]:
            yield norm_case(sizes, rows, g.hidden)
            yield add_norm_case(sizes, rows, g.hidden)
            yield silu_case(sizes, rows, g.inner)
            yield conv_case(sizes, rows, g.hidden, False)
            yield conv_case(sizes, rows, g.hidden, True)
        yield rope_case(sizes, g.requests * g.block, g.heads, g.kv_heads, g.dim)
        for tokens in TOKENS[sizes.name]:
            yield context_case(sizes, tokens, g.layers, g.kv_heads, g.dim)
        yield block_case(sizes, g.requests, g.block, g.hidden, g.vocab)
        yield embed_case(sizes, g.requests * g.block, g.hidden, g.vocab)
        yield verify_case(sizes, g.requests, min(g.block, VERIFY_WIDTH), g.vocab)


def norm_case(sizes, rows, width):
    out = torch.empty(rows, width, dtype=sizes.dtype)
    moved = cost.norm_bytes(rows, width, 2, add=False)
    copies = sizes.copies_of(moved)
    xs, weight = [sizes.random(rows, width) for _ in range(copies)], torch.rand(width).to(sizes.dtype)

    def expression(x, weight):
        return (F.rms_norm(x, (width,), weight, EPS),)

    problem = SimpleNamespace(expression=expression, args=lambda i: (xs[i], weight))
    return Case("rms_norm", f"{rows} x {width}", lambda i: dk.rms_norm(xs[i], weight, EPS, out=out), moved, copies,
                cost.norm_flops(rows, width, add=False), sizes.peers_of("rms_norm", problem),
                agreeing(lambda: expression(xs[0].float(), weight.float()), lambda: expression(xs[0], weight)),
                cached=sizes.cached(out))


def embed_case(sizes, tokens, hidden, vocab):
    out = torch.empty(tokens, hidden, dtype=sizes.dtype)
    moved = cost.embed_bytes(tokens, hidden, 2)
    table, copies = sizes.random(vocab, hidden), sizes.copies_of(moved)
    ids = torch.randint(0, vocab, (copies, tokens))

    def expression(ids, table):
        return (F.embedding(ids, table),)

    problem = SimpleNamespace(expression=expression, args=lambda i: (ids[i], table))
    return Case("embed_tokens", f"{tokens} rows of {vocab} x {hidden}",
                lambda i: dk.embed_tokens(ids[i], table, out=out), moved, copies,
                peers=sizes.peers_of("embed_tokens", problem),
                check=agreeing(lambda: expression(ids[0], table.float()), lambda: expression(ids[0], table)),
                cached=sizes.cached(out))


def add_norm_case(sizes, rows, width):
    out, sums = (torch.empty(rows, width, dtype=sizes.dtype) for _ in range(2))
    moved = cost.norm_bytes(rows, width, 2, add=True)
    copies = sizes.copies_of(moved)
    xs, residuals = ([sizes.random(rows, width) for _ in range(copies)] for _ in range(2))
    weight = torch.rand(width).to(sizes.dtype)

    def expression(x, residual, weight):
        h = x + residual
        return F.rms_norm(h, (width,), weight, EPS), h

    def truth():
        h = xs[0] + residuals[0]  # the sum is rounded, by definition of the op
        return F.rms_norm(h.float(), (width,), weight.float(), EPS), h.float()

    problem = SimpleNamespace(
        expression=expression, args=lambda i: (xs[i], residuals[i], weight), weight=weight, copies=copies
    )
    return Case("add_rms_norm", f"{rows} x {width}",
                lambda i: dk.add_rms_norm(xs[i], residuals[i], weight, out=out, residual_out=sums), moved, copies,
                cost.norm_flops(rows, width, add=True), sizes.peers_of("add_rms_norm", problem),
                agreeing(truth, lambda: expression(xs[0], residuals[0], weight)), headline=rows == 8192,
                cached=sizes.cached(out, sums))


def conv_case(sizes, rows, width, add_norm):
    """Blocks of the drafted width, with the taps and groups of published drafters."""
    block, taps, groups = min(rows, CONV_BLOCK), CONV_TAPS, width // CONV_GROUP
    out, sums = (torch.empty(rows // block, block, width, dtype=sizes.dtype) for _ in range(2))
    moved = cost.conv_bytes(rows, width, groups, taps, 2, add_norm=add_norm)
    copies = sizes.copies_of(moved)
    xs, residuals = ([sizes.random(rows // block, block, width) for _ in range(copies)] for _ in range(2))
    deltas = [sizes.random(rows // block, block, 2, taps, groups)[:, :, 1] for _ in range(copies)]
    base, weight = sizes.random(taps, width), torch.rand(width).to(sizes.dtype)

    def convolved(x, delta, base):
        blocks = x.reshape(*x.shape[:-1], groups, -1)
        coefficients = base.view(taps, groups, -1) + delta[..., None]
        y = coefficients[:, :, 0] * blocks
        for tap in range(1, taps):
            y = y + coefficients[:, :, tap] * F.pad(blocks, (0, 0, 0, 0, tap, 0))[:, :block]
        return y.flatten(-2)

    def expression(x, delta, residual, base, weight):
        y = convolved(x, delta, base)
        if not add_norm:
            return (y,)
        h = y + residual
        return F.rms_norm(h, (width,), weight, EPS), h

    def run(i):
        if not add_norm:
            return (dk.grouped_conv(xs[i], deltas[i], base, out=out),)
        return dk.grouped_conv_add_rms_norm(xs[i], deltas[i], base, residuals[i], weight, EPS, out=out,
                                            residual_out=sums)

    op = "grouped_conv_add_rms_norm" if add_norm else "grouped_conv"
    args = lambda i: (xs[i], deltas[i], residuals[i], base, weight)  # noqa: E731
    problem = SimpleNamespace(expression=expression, args=args)
    return Case(op, f"{rows} x {width}, blocks of {block}", run, moved, copies,
                cost.conv_flops(rows, width, taps, add_norm=add_norm), sizes.peers_of(op, problem),
                agreeing(lambda: expression(*(t.float() for t in args(0))), lambda: expression(*args(0))),
                cached=sizes.cached(out, *[sums] * add_norm))


def silu_case(sizes, rows, inner):
    out = torch.empty(rows, inner, dtype=sizes.dtype)
    moved = cost.activation_bytes(rows, inner, 2)
    copies = sizes.copies_of(moved)
    gates = [sizes.random(rows, 2 * inner) for _ in range(copies)]

    def expression(x):
        gate, up = x.chunk(2, -1)
        return (F.silu(gate) * up,)

    problem = SimpleNamespace(expression=expression, args=lambda i: (gates[i],))
    return Case("silu_and_mul", f"{rows} x {inner}", lambda i: dk.silu_and_mul(gates[i], out=out), moved, copies,
                cost.activation_flops(rows, inner), sizes.peers_of("silu_and_mul", problem),
                agreeing(lambda: expression(gates[0].float()), lambda: expression(gates[0])),
                cached=sizes.cached(out))


def rotated(x, cos_sin):
    """The halves of x (T, heads, D) rotated by rows of the table (T, R), R <= D."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin.to(x.dtype)[:, None].split(half, -1)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def rope_case(sizes, tokens, heads, kv_heads, dim):
    moved = cost.rope_bytes(tokens, heads, kv_heads, dim, dim, 2)
    copies = sizes.copies_of(moved)
    rows = [sizes.random(tokens, (heads + 2 * kv_heads) * dim) for _ in range(copies)]
    theirs = [t.clone() for t in rows]  # ours are changed in place
    positions, table = torch.arange(tokens), torch.randn(tokens, dim)
    weights = [torch.rand(dim).to(sizes.dtype) for _ in range(2)]
    args = lambda i: (theirs[i], positions, table, *weights)  # noqa: E731

    def expression(qkv, positions, table, *weights):
        q, k, v = qkv.view(tokens, -1, dim).split((heads, kv_heads, kv_heads), 1)
        q, k = (rotated(F.rms_norm(t, (dim,), w, EPS), table[positions]) for t, w in zip((q, k), weights, strict=True))
        return (torch.cat((q, k, v), 1).flatten(1),)

    problem = SimpleNamespace(expression=expression, args=args)
    return Case("qk_norm_rope", f"{tokens} tokens, {heads}/{kv_heads} heads of {dim}",
                lambda i: dk.qk_norm_rope(rows[i], positions, table, num_heads=heads, num_kv_heads=kv_heads,
                                          head_dim=dim, q_weight=weights[0], k_weight=weights[1], eps=EPS),
                moved, copies, cost.rope_flops(tokens, heads, kv_heads, dim, dim),
                sizes.peers_of("qk_norm_rope", problem),
                agreeing(lambda: expression(*(t.float() if t.is_floating_point() else t for t in args(0))),
                         lambda: expression(*args(0))))


def context_case(sizes, tokens, layers, kv_heads, dim):
    moved = cost.context_bytes(tokens, layers, kv_heads, dim, dim, 2)
    copies = sizes.copies_of(moved)
    kv = [sizes.random(tokens, layers * 2 * kv_heads * dim) for _ in range(copies)]
    pages = -(-tokens // PAGE)
    caches = [[dk.PagedKV(*(torch.empty(pages, kv_heads, PAGE, dim, dtype=sizes.dtype).transpose(1, 2)
                            for _ in "kv")) for _ in range(layers)] for _ in range(copies)]
    positions, slots = torch.arange(tokens), torch.randperm(pages * PAGE)[:tokens]
    table, weights = torch.randn(tokens, dim), torch.rand(layers, dim).to(sizes.dtype)
    pools = [torch.empty(layers, pages * PAGE, kv_heads, dim, dtype=sizes.dtype) for _ in "kv"]

    def run(i):
        dk.write_context_kv(kv[i], positions, slots, caches[i], k_weights=weights, cos_sin=table, eps=EPS)
        return lambda: tuple(torch.stack([getattr(cache, name).flatten(0, 1)[slots] for cache in caches[i]])
                             for name in "kv")

    def expression(rows):
        """K, normalised and rotated, and V: (tokens, layers, heads, dim)."""
        k, v = rows.view(tokens, layers, 2, kv_heads, dim).unbind(2)
        k = F.rms_norm(k, (dim,), None, EPS) * weights.to(rows.dtype)[:, None]
        return rotated(k.flatten(1, 2), table[positions]).view_as(k), v

    def whole(rows):
        for pool, written in zip(pools, expression(rows), strict=True):
            pool[:, slots] = written.transpose(0, 1)

    problem = SimpleNamespace(
        expression=expression,
        whole=whole,
        written=lambda: tuple(pool[:, slots] for pool in pools),
        args=lambda i: (kv[i],),
        kv=kv,
        positions=positions,
        slots=slots,
        page=PAGE,
        weights=weights,
        cos_sin=table,
        layers=layers,
        heads=kv_heads,
        dim=dim,
        eps=EPS,
        num_slots=pages * PAGE,
    )
    by_layer = lambda found: tuple(t.transpose(0, 1) for t in found)  # noqa: E731
    return Case("write_context_kv", f"{tokens} tokens, {layers} layers, {kv_heads} heads of {dim}", run, moved, copies,
                cost.context_flops(tokens, layers, kv_heads, dim, dim),
                sizes.peers_of("write_context_kv", problem),
                agreeing(lambda: by_layer(expression(kv[0].float())), lambda: by_layer(expression(kv[0]))),
                headline=tokens == 4096)


def block_case(sizes, requests, width, hidden, vocab):
    embedding = sizes.random(vocab, hidden)
    anchors, lens = torch.arange(requests), torch.full((requests,), 100, dtype=torch.int32)
    table = torch.arange(1, requests * 4 + 1, dtype=torch.int32).view(requests, 4)  # vLLM writes nothing to page 0
    prepared = dk.prepare_block(anchors, lens, width, 7, page_table=table, page_size=PAGE, embedding=embedding)
    fields = ("ids", "positions", "slots", "rows")

    args = (anchors, lens, table, embedding)

    def expression(anchors, lens, table, embedding):
        ids = torch.cat((anchors[:, None], torch.full_like(anchors[:, None], 7).expand(-1, width - 1)), 1)
        positions = lens[:, None].long() + torch.arange(width, device=lens.device)
        slots = table.gather(1, positions // PAGE).long() * PAGE + positions % PAGE
        return ids, positions, slots, F.embedding(ids, embedding)

    def run(i):
        dk.prepare_block(anchors, lens, width, 7, page_table=table, page_size=PAGE, embedding=embedding, out=prepared)
        return tuple(getattr(prepared, f) for f in fields)

    def truth():
        made = [torch.empty_like(getattr(prepared, f)) for f in fields]
        reference.block.prepare_block(anchors, lens, 7, table, PAGE, None, embedding, 0, *made)
        return (*made[:3], made[3].float())

    problem = SimpleNamespace(expression=expression, args=lambda i: args, anchors=anchors, lens=lens, table=table,
                              page=PAGE, width=width, mask=7, embedding=embedding)
    return Case("prepare_block", f"{requests} blocks of {width}, hidden {hidden}", run,
                cost.block_bytes(requests, width, hidden=hidden, itemsize=2), sizes.copies_of(1 << 20),
                peers=sizes.peers_of("prepare_block", problem), check=agreeing(truth, lambda: expression(*args)))


def verify_case(sizes, requests, width, vocab):
    """As many right guesses as the request's number, where the block is as long. A CPU reads the rows up to the first
    wrong guess, and those alone are counted; torch and a GPU's kernels read all."""
    copies = sizes.copies_of(cost.verify_bytes(requests, width, vocab=vocab, itemsize=2))
    logits = [sizes.random(requests, width, vocab) for _ in range(copies)]
    drafts = [torch.randint(0, vocab, (requests, width)) for _ in range(copies)]
    for guesses, rows in zip(drafts, logits, strict=True):
        for b in range(requests):
            guesses[b, 1:b + 1] = rows[b, :min(b, width - 1)].argmax(-1)
    lens = torch.full((requests,), 100, dtype=torch.int32)
    made = dk.verify_greedy(drafts[0], None, lens, logits=logits[0])
    read = sum(min(b, width - 1) + 1 for b in range(requests)) if sizes.device == "cpu" else None

    def expression(drafts, logits, lens):
        target = logits.argmax(-1)
        accepted = (drafts[:, 1:] == target[:, :-1]).int().cumprod(1).sum(1).int()
        return accepted, target.gather(1, accepted.long()[:, None])[:, 0], lens + accepted + 1

    def run(i):
        dk.verify_greedy(drafts[i], None, lens, logits=logits[i], out=made)
        return made.accept_lens, made.bonus, made.new_lens

    problem = SimpleNamespace(
        expression=expression, args=lambda i: (drafts[i], logits[i], lens), drafts=drafts, logits=logits, lens=lens
    )
    return Case("verify_greedy", f"{requests} x {width} x {vocab} logits", run,
                cost.verify_bytes(requests, width, vocab=vocab, itemsize=2, rows=read), copies,
                cost.verify_flops(requests, width, vocab=vocab, rows=read), sizes.peers_of("verify_greedy", problem),
                agreeing(lambda: expression(drafts[0], logits[0], lens)), headline=True)
