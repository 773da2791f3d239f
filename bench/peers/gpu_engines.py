"""SGLang's and vLLM's own kernels for our ops, from the files of gpu_peers.FILES, called as in their DFlash workers."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.peers.gpu_peers import load, peer


@peer("verify_greedy", "sglang")
def sglang_verify(p):
    """torch.argmax, then one kernel for acceptance, bonus and lengths."""
    verify = load("sglang", "kernels/ops/speculative/dflash.py")._compute_dflash_accept_bonus_triton_unchecked
    batch = p.lens.shape[0]
    accepted, committed = (torch.empty(batch, dtype=torch.int32) for _ in range(2))
    bonus, lens, tokens = torch.empty(batch).long(), torch.empty(batch).long(), torch.empty_like(p.drafts[0])

    def call(i):
        verify(p.drafts[i], p.logits[i].argmax(-1), accepted, committed, bonus, tokens, p.lens, lens)
        return lambda: (accepted, bonus, lens.int())

    return call


@peer("verify_greedy", "vllm")
def vllm_verify(p):
    """vLLM's rejection sampler at temperature 0."""
    sample = load("vllm", "v1/worker/gpu/spec_decode/rejection_sampler_utils.py").rejection_sample
    batch, width = p.drafts[0].shape
    starts, requests = torch.arange(batch + 1).int() * width, torch.arange(batch).int()
    of_row, in_block = requests[:, None].expand(batch, width).reshape(-1), torch.arange(width).int().repeat(batch)
    positions = (p.lens[:, None] + torch.arange(width)).long().view(-1)
    zeros, seeds = torch.zeros(batch), torch.zeros(batch).long()

    def call(i):
        tokens, counts = sample(p.logits[i].flatten(0, 1), None, p.drafts[i].view(-1), starts, positions, requests,
                                of_row, in_block, zeros, seeds, width - 1)
        return lambda: (counts - 1, tokens.gather(1, counts.long()[:, None] - 1)[:, 0], p.lens + counts)

    return call


@peer("prepare_block", "sglang")
def sglang_prepare(p):
    """One kernel, then the embedding. Its table has a slot for every token of a request."""
    prepare = load("sglang", "kernels/ops/speculative/dflash.py")._prepare_dflash_draft_block_unchecked
    batch = p.anchors.shape[0]
    slots_of = (p.table[:, :, None] * p.page + torch.arange(p.page).int()).flatten(1)
    ids, positions, slots = (torch.empty(batch, p.width).long() for _ in range(3))
    requests = torch.arange(batch)

    def call(i):
        prepare(p.anchors, p.lens, requests, slots_of, ids, positions, slots, p.mask)
        return ids, positions, slots, F.embedding(ids, p.embedding)

    return call


@peer("prepare_block", "vllm")
def vllm_prepare(p):
    """One kernel, then the embedding. It also prepares the context's rows: here one for each request."""
    prepare = load("vllm", "v1/worker/gpu/spec_decode/dflash/speculator.py").prepare_dflash_inputs
    batch, tokens = p.anchors.shape[0], p.anchors.shape[0] * p.width
    int32, int64 = (lambda *n: torch.zeros(n).int()), (lambda *n: torch.zeros(n).long())
    buffers = SimpleNamespace(input_ids=int32(tokens), positions=int64(tokens), is_padding=torch.zeros(tokens).bool(),
                              query_start_loc=int32(batch + 1), seq_lens=int32(batch))
    target = SimpleNamespace(num_reqs=batch, num_scheduled_tokens=torch.ones(batch, device="cpu").int().numpy(),
                             positions=p.lens.long() - 1, query_start_loc=torch.arange(batch + 1).int(),
                             idx_mapping=torch.arange(batch).int())
    slots, samples = int64(tokens), [int64(batch * (p.width - 1)) for _ in range(3)]
    context, state = [int64(batch) for _ in range(2)], [torch.zeros(batch), int64(batch)]
    ones, zeros = torch.ones(batch).int(), int32(batch)

    def call(i):
        prepare(buffers, slots, *context, *samples, *state, target, ones, zeros, p.anchors, zeros, *state, p.table,
                p.page, 0, 1, 1, p.mask, p.width, p.width - 1, batch, tokens, 1 << 20)
        found = (t.view(batch, p.width) for t in (buffers.input_ids, buffers.positions, slots))
        rows = F.embedding(buffers.input_ids, p.embedding).view(batch, p.width, -1)
        return lambda: (next(found).long(), next(found), next(found), rows)

    return call


@peer("write_context_kv", "sglang, torch's cache writes")
def sglang_context(p):
    """One kernel into a workspace, then a write for each layer. SGLang's own write is CUDA C++ of sglang-kernel."""
    norm_rope = load("sglang", "kernels/ops/speculative/fused_kv_materialize.py")._fused_norm_rope_stacked
    tokens, eps = p.positions.shape[0], torch.full((p.layers,), p.eps)
    k, v = (torch.empty(p.layers, tokens, p.heads, p.dim, dtype=p.weights.dtype) for _ in range(2))
    pools = [torch.zeros(p.layers, p.num_slots, p.heads, p.dim, dtype=k.dtype) for _ in range(2)]

    def call(i):
        norm_rope(p.kv[i].view(tokens, p.layers, -1), p.weights, eps, p.cos_sin, p.positions, p.heads, p.dim,
                  p.cos_sin.shape[1], k, v)
        for layer in range(p.layers):
            pools[0][layer][p.slots], pools[1][layer][p.slots] = k[layer], v[layer]
        return lambda: tuple(pool[:, p.slots] for pool in pools)

    return call


@peer("write_context_kv", "vllm's cache writes, torch's norm and rope")
def vllm_context(p):
    """vLLM's norm and rotation are CUDA C++ of its own library; its writes to the cache are Triton, one a layer."""
    write = load("vllm", "v1/attention/ops/triton_reshape_and_cache_flash.py").triton_reshape_and_cache_flash
    caches = [torch.zeros(p.layers, p.num_slots // p.page, p.page, p.heads, p.dim, dtype=p.weights.dtype)
              for _ in range(2)]
    one = torch.ones(())

    def call(i):
        k, v = p.expression(*p.args(i))
        for layer in range(p.layers):
            write(k[:, layer], v[:, layer], caches[0][layer], caches[1][layer], p.slots, "auto", one, one)
        return lambda: tuple(cache.flatten(1, 2)[:, p.slots] for cache in caches)

    return call


@peer("grouped_conv", "vllm")
def vllm_conv(p):
    convolve = load("vllm", "model_executor/models/qwen3_dflash2.py").dflash2_grouped_conv_impl

    def call(i):
        x, delta, _residual, base, _weight = p.args(i)
        group = x.shape[2] // delta.shape[3]
        return convolve(x.flatten(0, 1), delta.flatten(0, 1), base, x.shape[1], group).view(x.shape)

    return call


@peer("select_candidates", "vllm")
def vllm_select(p):
    """The scores of all edges, by Beam's kernel, which takes them without tensors in between; then the walk."""
    score = load("vllm", "models/beam/nvidia/dflash2_ops.py").candidate_edges
    _values, ids, *_ = p.args(0)
    (requests, slots, k), device = ids.shape, ids.device
    walk = load("vllm", "v1/worker/gpu/spec_decode/dflash2/speculator.py").CandidateSampler(requests, slots, k, device)
    positions, rows = torch.arange(requests * slots), torch.arange(requests).repeat_interleave(slots)
    zeros, seeds, tokens = torch.zeros(requests), torch.zeros(requests).long(), torch.empty(requests, slots).long()

    def call(i):
        values, ids, hidden, anchors = p.args(i)
        scores = score(*p.codebooks, ids, values, hidden, anchors, k)
        walk.sample(ids, scores, requests, positions, rows, zeros, seeds, tokens, None, False)
        return tokens

    return call
