"""Both plugins against the engines' own functions, taken from their wheels and run in Triton's interpreter."""

import types

import pytest
import torch
import torch.nn.functional as F

from dflash_engines.hooks import LEFT
from dflash_engines.sglang import context, sampling
from dflash_kernels import Verified, prepare_block, verify_greedy
from tests.support.engine_files import take
from tests.support.sglang_parts import DIM, HEADS, HIDDEN, OPS, by_path, drafts, install, loaded, worker_with


@pytest.fixture
def engine(monkeypatch):
    return install(monkeypatch)


@pytest.mark.parametrize("dtype, rotary", [(torch.float32, DIM), (torch.float16, DIM), (torch.float32, DIM // 2)])
@pytest.mark.parametrize("prefix", [False, True])
def test_context_kv_writes_what_sglang_writes(engine, dtype, rotary, prefix):
    theirs, expected = worker_with(engine, dtype, rotary)
    slots = torch.tensor([[3, 9, 4, 17], [1, 22, 5, 6], [11, 12, 13, 14]])
    hidden, positions = torch.randn(12, HIDDEN).to(dtype), torch.arange(12) + 5
    given = [hidden, positions, slots.flatten(), *([slots, torch.tensor([2, 0, 4], dtype=torch.int32)] * prefix)]
    theirs._append_target_hidden_fused(*given)
    loaded(engine)
    ours, found = worker_with(engine, dtype, rotary)
    ours._append_target_hidden_fused(*given)
    assert ours._dflash_context_kv[0] is not None
    for a, b in zip(found.k_buffer + found.v_buffer, expected.k_buffer + expected.v_buffer, strict=True):
        assert b.any() and torch.equal(a.any((1, 2)), b.any((1, 2)))  # the same rows
        torch.testing.assert_close(a, b)
    assert torch.equal(found.v_buffer[0], expected.v_buffer[0])


@pytest.mark.parametrize("change", [
    {"ctx_hidden": torch.zeros(2, 4, HIDDEN)}, {"ctx_hidden": torch.zeros(8, HIDDEN + 1)},
    {"ctx_positions": torch.zeros(7).long()}, {"ctx_positions": torch.zeros(8)},
    {"ctx_cache_loc": torch.zeros(9).long()}, {"ctx_cache_loc_2d": torch.zeros(2, 4).long(),
                                                     "commit_lens": torch.zeros(3).int()}])
def test_context_kv_leaves_what_it_was_not_written_for(engine, change):
    worker, _ = worker_with(engine, torch.float32, DIM)
    given = {"ctx_hidden": torch.zeros(8, HIDDEN), "ctx_positions": torch.arange(8), "ctx_cache_loc": torch.arange(8)}
    assert context._append_target_hidden_fused(worker, **given) is not LEFT
    assert context._append_target_hidden_fused(worker, **given | change) is LEFT


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("after", [False, True], ids=["before the first write", "after it"])
def test_a_fault_in_context_kv(engine, monkeypatch, caplog, prefix, after):
    theirs, expected = worker_with(engine, torch.float32, DIM)
    slots, tried = torch.tensor([[3, 9, 4, 17], [1, 22, 5, 6]]), []
    given = [torch.randn(8, HIDDEN), torch.arange(8) + 5, slots.flatten(),
             *([slots, torch.tensor([2, 4], dtype=torch.int32)] * prefix)]
    written = slots[0, :2].tolist() + slots[1].tolist() if prefix else slots.flatten().tolist()

    def broken(kv, positions, slots, caches, **options):
        tried.append(kv)
        for cache in caches[:2] if after else ():
            cache.k[written], cache.v[written] = 77.0, 77.0
        raise RuntimeError("write_context_kv is broken")

    theirs._append_target_hidden_fused(*given)
    loaded(engine)
    monkeypatch.setattr(context, "write_context_kv", broken)
    ours, found = worker_with(engine, torch.float32, DIM)
    for _ in range(2):
        ours._append_target_hidden_fused(*given)
        for a, b in zip(found.k_buffer + found.v_buffer, expected.k_buffer + expected.v_buffer, strict=True):
            assert torch.equal(a, b)
    assert len(tried) == 1 and [r.levelname for r in caplog.records].count("WARNING") == 1


def test_context_kv_scales_values_as_the_layers_do(engine):
    """The engine's fused helper drops a checkpoint's attention_value_scale, its own per-layer path does not."""
    ours, pool = worker_with(engine, torch.float32, DIM, v_scale=0.5)
    hidden = torch.randn(2, HIDDEN)
    slots = torch.tensor([4, 7])
    context.write(ours._fused_kv_helper, context.decide(ours), hidden, torch.arange(2), slots, None)
    weight = ours.draft_model.layers[1].self_attn.qkv_proj.weight[-HEADS * DIM:]
    torch.testing.assert_close(pool.v_buffer[1][slots].flatten(1), 0.5 * F.linear(hidden, weight))


@pytest.mark.parametrize("change, why", [
    (lambda w, p: setattr(p, "use_hnd", True), "a pool that is not one row for each token"),
    (lambda w, p: setattr(type(p), "__name__", "SWAKVPool"), "a pool of SWAKVPool"),
    (lambda w, p: p.k_buffer.__setitem__(0, p.k_buffer[0].to(torch.float8_e4m3fn)), "a pool of torch.float8_e4m3fn"),
])
def test_context_kv_says_what_it_does_not_cover(engine, change, why):
    worker, pool = worker_with(engine, torch.float32, DIM)
    change(worker, pool)
    assert why in context.decide(worker)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draft_head_gives_sglangs_tokens(engine, dtype):
    hidden, weight = torch.randn(12, HIDDEN).to(dtype), torch.randn(60, HIDDEN).to(dtype)
    weight[40:50] = weight[:10]  # ties across ranks
    expected = drafts(engine, 1, hidden, weight)[0]
    assert drafts(engine, 2, hidden, weight) == [expected] * 2
    loaded(engine)
    assert drafts(engine, 1, hidden, weight) == [expected]
    assert drafts(engine, 2, hidden, weight) == [expected] * 2


def test_sampling_follows_sglangs_distribution(engine):
    """Chi-square of the bonus token against the probabilities that SGLang's own code gives the target."""
    loaded(engine)
    namespace = take("sglang", "srt/speculative/dflash_utils.py", ["build_speculative_verify_target_probs"],
                     {"torch": torch, "F": F})
    draws, vocab, width = 20_000, 12, 3
    info = types.SimpleNamespace(temperatures=torch.full((draws, 1), 0.7), top_ks=torch.full((draws,), 5),
                                 top_ps=torch.ones(draws), need_top_k_sampling=True, need_top_p_sampling=False)
    logits = torch.randn(width, vocab).repeat(draws, 1)
    one = types.SimpleNamespace(temperatures=info.temperatures[:1], top_ks=info.top_ks[:1], need_top_k_sampling=True,
                                need_top_p_sampling=False)
    distribution = namespace["build_speculative_verify_target_probs"](
        next_token_logits=logits[:width], sampling_info=one, draft_token_num=width, bs=1)[0].double()
    draft = distribution[0].argmax()
    candidates = torch.stack([torch.tensor(1), draft, distribution[1].argmax()]).repeat(draws, 1)
    accepted, bonus = engine[1].compute_dflash_sampling_correct_drafts_and_bonus(
        candidates=candidates, next_token_logits=logits, sampling_info=info, threshold_single=1.0, threshold_acc=1.0)
    assert accepted.dtype == torch.int32 and bonus.dtype == torch.int64
    first = torch.where(accepted > 0, draft, bonus)  # what stands at the first position
    counts = torch.bincount(first, minlength=vocab).double()
    expected = distribution[0] * draws
    assert (counts[distribution[0] == 0] == 0).all()
    chi = ((counts - expected) ** 2 / expected.clamp_min(1e-9))[distribution[0] > 0].sum()
    assert chi < 30, chi  # 4 degrees of freedom: 1e-5 is 28.5


def test_params_in_the_engines_shapes():
    info = types.SimpleNamespace(temperatures=torch.ones(2, 1), top_ks=torch.tensor([4, 1 << 30]),
                                 top_ps=torch.tensor([0.5, 1.0]), need_top_k_sampling=False, need_top_p_sampling=True)
    made = sampling.params_of(info, torch.device("cpu"))
    assert made.temperature.shape == made.top_p.shape == (2,) and made.top_k is None


def test_accept_and_prepare_are_sglangs():
    """Not hooked (one launch there already): ours give the same on its tensors, for who wants to call them."""
    theirs = by_path("sglang_dflash", OPS + "dflash.py")
    b, q, table = 3, 4, torch.randint(1, 99, (6, 40), dtype=torch.int32)
    rows, lens, anchors = torch.tensor([5, 2, 3]), torch.tensor([7, 36, 0]), torch.tensor([11, 12, 13])
    ids, positions, slots = (torch.empty(b, q, dtype=torch.int64) for _ in range(3))
    theirs._prepare_dflash_draft_block_unchecked(anchors, lens, rows, table, ids, positions, slots, 77)
    made = prepare_block(anchors, lens.int(), q, 77, page_table=table[rows], page_size=1)
    assert torch.equal(made.ids, ids) and torch.equal(made.positions, positions) and torch.equal(made.slots, slots)
    target = torch.randint(0, 3, (b, q))
    ids[:, 1:] = torch.randint(0, 3, (b, q - 1))
    ids[0, 1:] = target[0, :-1]
    out = [torch.empty(b, dtype=d) for d in (torch.int32, torch.int32, torch.int64)]
    tokens, new = torch.empty(b, q, dtype=torch.int64), torch.empty(b, dtype=torch.int64)
    theirs._compute_dflash_accept_bonus_triton_unchecked(ids, target, *out, tokens, lens, new)
    found = verify_greedy(ids, target, lens.int())
    assert isinstance(found, Verified) and torch.equal(found.accept_lens, out[0])
    assert torch.equal(found.commit_lens, out[1]) and torch.equal(found.bonus, out[2])
    assert torch.equal(found.new_lens.long(), new)
    kept = torch.arange(q) < out[1][:, None]
    assert torch.equal(found.tokens[kept], tokens[kept])
