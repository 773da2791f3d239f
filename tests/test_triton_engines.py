"""Both plugins against the engines' own functions, taken from their wheels and run in Triton's interpreter."""

import importlib.util
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from engine_files import source, take

from dflash_decode.engines import sglang as plugin
from dflash_decode.engines.sglang import context, sampling
from dflash_kernels import Verified, prepare_block, verify_greedy

WORKER, OPS = "srt/speculative/dflash_worker_v2.py", "kernels/ops/speculative/"
LAYERS, HEADS, DIM, HIDDEN, ROWS = 3, 2, 16, 32, 24


def by_path(name, path):
    spec = importlib.util.spec_from_file_location(name, source("sglang", path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def engine(monkeypatch):
    """SGLang's package with its real HookRegistry and the real code of what is hooked, and nothing else."""
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.speculative", "sglang.version",
                 "sglang.srt.speculative.dflash_utils", "sglang.srt.speculative.dflash_worker_v2"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    registry = by_path("sglang.srt.plugins.hook_registry", "srt/plugins/hook_registry.py")
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    sys.modules["sglang.version"].__version__ = "0.5.23"
    worker, utils = (sys.modules[f"sglang.srt.speculative.dflash_{n}"] for n in ("worker_v2", "utils"))
    take("sglang", WORKER, ["_DflashDraftSampler", "DFlashWorkerV2._append_target_hidden_fused"], worker.__dict__)
    worker.torch, worker.KVWriteLoc = torch, lambda loc, physical: loc
    take("sglang", "srt/speculative/dflash_utils.py", ["compute_dflash_sampling_correct_drafts_and_bonus"],
         utils.__dict__)
    utils.torch = torch
    monkeypatch.setenv("DFLASH_SGLANG_ENABLE", "sampling")
    worker.compute_dflash_sampling_correct_drafts_and_bonus = utils.compute_dflash_sampling_correct_drafts_and_bonus
    return worker, utils, registry.HookRegistry


def loaded(engine):
    outcomes = plugin.register()
    assert [(o.name, o.why) for o in outcomes] == [("context_kv", ""), ("draft_head", ""), ("sampling", "")]
    engine[2].apply_hooks()


def test_the_registry_calls_us(engine):
    worker, utils, registry = engine
    loaded(engine)
    assert plugin.register() and all(len(hooks) == 1 for hooks in registry._hooks.values())  # twice is once
    sampler = worker._DflashDraftSampler(weight=torch.randn(50, HIDDEN), block_size=4, num_org=50, org_vocab_start=0,
                                         max_bs=2)
    sampler(torch.randn(8, HIDDEN))
    assert sampler._dflash_draft_head[0] is not None
    # The copy that the worker imported by name is replaced too.
    assert worker.compute_dflash_sampling_correct_drafts_and_bonus is (
        utils.compute_dflash_sampling_correct_drafts_and_bonus)


@pytest.mark.parametrize("name", ["context_kv", "draft_head", "sampling"])
def test_a_changed_signature_leaves_that_hook_alone(engine, monkeypatch, name):
    worker, utils, registry = engine
    owner, attribute = {"context_kv": (worker.DFlashWorkerV2, "_append_target_hidden_fused"),
                        "draft_head": (worker._DflashDraftSampler, "__call__"),
                        "sampling": (utils, "compute_dflash_sampling_correct_drafts_and_bonus")}[name]
    monkeypatch.setattr(owner, attribute, lambda self, step: None)
    outcomes = {o.name: o.why for o in plugin.register()}
    assert outcomes.pop(name).startswith("its parameters changed: without ")
    assert set(outcomes.values()) == {""} and len(registry._hooks) == 2


def test_a_hook_is_turned_off_by_name(engine, monkeypatch):
    monkeypatch.setenv("DFLASH_SGLANG_DISABLE", "sampling")
    assert [o.why for o in plugin.register()] == ["", "", "disabled by DFLASH_SGLANG_DISABLE"]
    assert len(engine[2]._hooks) == 2


class MHATokenToKVPool:
    """Row-per-token buffers, and the writes of SGLang's pool where there is no GPU."""

    use_hnd, kv_cache_layout, start_layer = False, "nhd", 30

    def __init__(self, dtype):
        self.k_buffer, self.v_buffer = ([torch.zeros(ROWS, HEADS, DIM, dtype=dtype) for _ in range(LAYERS)]
                                        for _ in range(2))

    def set_kv_buffer(self, layer, loc, k, v, k_scale=None, v_scale=None, layer_id_override=None):
        self.k_buffer[layer.layer_id - self.start_layer][loc] = k
        self.v_buffer[layer.layer_id - self.start_layer][loc] = v


def worker_with(engine, dtype, rotary, v_scale=None):
    worker = engine[0].DFlashWorkerV2.__new__(engine[0].DFlashWorkerV2)
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(64, rotary, generator=generator)
    rotary_emb = types.SimpleNamespace(rotary_dim=rotary, is_neox_style=True, cos_sin_cache=table)
    width, layers = HEADS * DIM, []
    for i in range(LAYERS):
        inner = types.SimpleNamespace(layer_id=30 + i, k_scale=None, v_scale=None)
        weight = torch.randn(2 * width + 2 * width, HIDDEN, generator=generator).to(dtype)
        norm = types.SimpleNamespace(weight=torch.randn(DIM, generator=generator).to(dtype), variance_epsilon=1e-6)
        layers.append(types.SimpleNamespace(self_attn=types.SimpleNamespace(
            attn=inner, num_kv_heads=HEADS, head_dim=DIM, rotary_emb=rotary_emb, k_norm=norm, q_size=2 * width,
            kv_size=width, v_scale=v_scale, qkv_proj=types.SimpleNamespace(weight=weight))))
    pool = type("MHATokenToKVPool", (MHATokenToKVPool,), {})(dtype)
    namespace = {"torch": torch, "_is_cuda": False, "_is_hip": False}
    take("sglang", "srt/mem_cache/memory_pool.py", ["MHATokenToKVPool.set_kv_buffer_prefix_valid"], namespace)
    type(pool).set_kv_buffer_prefix_valid = namespace["MHATokenToKVPool"].set_kv_buffer_prefix_valid
    worker.draft_model = types.SimpleNamespace(layers=layers)
    worker.draft_model_runner = types.SimpleNamespace(token_to_kv_pool=pool)
    helper = by_path("fused_kv_materialize", OPS + "fused_kv_materialize.py").FusedKVMaterializeHelper
    worker._fused_kv_helper = helper(layers, rotary_emb, HEADS, DIM, torch.device("cpu"), max_position_hint=64)
    return worker, pool


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


def test_context_kv_scales_values_as_the_layers_do(engine):
    """The engine's fused helper drops a checkpoint's attention_value_scale, its own per-layer path does not."""
    ours, pool = worker_with(engine, torch.float32, DIM, v_scale=0.5)
    hidden = torch.randn(2, HIDDEN)
    slots = torch.tensor([4, 7])
    context.write(ours._fused_kv_helper, context.decide(ours), hidden, torch.arange(2), slots, None, None)
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


class Group:
    """Ranks as threads of one process."""

    def __init__(self, ranks):
        self.world_size, self.barrier, self.parts = ranks, threading.Barrier(ranks), {}

    def of(self, rank):
        def gather(out, local):
            self.parts[rank] = local.clone()
            self.barrier.wait(30)
            out.copy_(torch.cat([self.parts[r] for r in range(self.world_size)]))
            self.barrier.wait(30)

        return types.SimpleNamespace(world_size=self.world_size, all_gather_into_tensor=gather)


def drafts(engine, ranks, hidden, weight):
    group, width = Group(ranks), len(weight) // ranks
    samplers = [engine[0]._DflashDraftSampler(
        weight=weight[r * width:(r + 1) * width], block_size=4, num_org=width, org_vocab_start=r * width,
        max_bs=hidden.shape[0] // 4, tp_group=group.of(r) if ranks > 1 else None) for r in range(ranks)]
    threads = [threading.Thread(target=sampler, args=(hidden,)) for sampler in samplers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [sampler.out.tolist() for sampler in samplers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draft_head_gives_sglangs_tokens(engine, dtype):
    hidden, weight = torch.randn(12, HIDDEN).to(dtype), torch.randn(60, HIDDEN).to(dtype)
    weight[40:50] = weight[:10]  # ties across ranks
    expected = drafts(engine, 1, hidden, weight)[0]
    assert drafts(engine, 2, hidden, weight) == [expected] * 2
    loaded(engine)
    assert drafts(engine, 1, hidden, weight) == [expected]
    assert drafts(engine, 2, hidden, weight) == [expected] * 2


def test_sampling_follows_sglangs_law(engine):
    """Chi-square of the bonus token against the probabilities that SGLang's own code gives the target."""
    loaded(engine)
    namespace = take("sglang", "srt/speculative/dflash_utils.py", ["build_speculative_verify_target_probs"],
                     {"torch": torch, "F": F})
    draws, vocab, width = 20_000, 12, 3
    info = types.SimpleNamespace(temperatures=torch.full((draws, 1), 0.7), top_ks=torch.full((draws,), 5),
                                 need_top_k_sampling=True, need_top_p_sampling=False)
    logits = torch.randn(width, vocab).repeat(draws, 1)
    one = types.SimpleNamespace(temperatures=info.temperatures[:1], top_ks=info.top_ks[:1], need_top_k_sampling=True,
                                need_top_p_sampling=False)
    law = namespace["build_speculative_verify_target_probs"](
        next_token_logits=logits[:width], sampling_info=one, draft_token_num=width, bs=1)[0].double()
    draft = law[0].argmax()
    candidates = torch.stack([torch.tensor(1), draft, law[1].argmax()]).repeat(draws, 1)
    accepted, bonus = engine[1].compute_dflash_sampling_correct_drafts_and_bonus(
        candidates=candidates, next_token_logits=logits, sampling_info=info, threshold_single=1.0, threshold_acc=1.0)
    assert accepted.dtype == torch.int32 and bonus.dtype == torch.int64
    first = torch.where(accepted > 0, draft, bonus)  # what stands at the first position
    counts = torch.bincount(first, minlength=vocab).double()
    expected = law[0] * draws
    assert (counts[law[0] == 0] == 0).all()
    chi = ((counts - expected) ** 2 / expected.clamp_min(1e-9))[law[0] > 0].sum()
    assert chi < 30, chi  # 4 degrees of freedom: 1e-5 is 28.5


def test_sampling_leaves_relaxed_thresholds(engine):
    seen = []
    replacement = sampling.build(lambda **given: seen.append(given) or "theirs")
    assert replacement(candidates=None, next_token_logits=None, sampling_info=None, threshold_single=0.9,
                       threshold_acc=1.0) == "theirs"
    assert seen[0]["threshold_single"] == 0.9


def test_sampling_is_off_by_itself(engine, monkeypatch):
    monkeypatch.delenv("DFLASH_SGLANG_ENABLE")
    assert [o.why for o in plugin.register()] == ["", "", "not run on a GPU yet"]


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
