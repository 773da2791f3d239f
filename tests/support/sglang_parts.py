"""What of SGLang our hooks touch, taken from its wheel, and stand-ins for what is around it."""

import importlib.util
import sys
import threading
import types

import torch
import torch.nn.functional as F
from torch import nn

import dflash_kernels
from dflash_engines import hooks
from dflash_engines import sglang as plugin
from tests.support.engine_files import source, take

WORKER, OPS = "srt/speculative/dflash_worker_v2.py", "kernels/ops/speculative/"
MODELS, WALK = "sglang.srt.models.dflash", "sglang.kernels.ops.speculative.dflash"
ENABLED = "context_kv", "draft_head", "sampling", "grouped_conv", "selector"
LAYERS, HEADS, DIM, HIDDEN, ROWS = 3, 2, 16, 32, 24


def by_path(name, path):
    spec = importlib.util.spec_from_file_location(name, source("sglang", path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(monkeypatch):
    """SGLang's package with its real HookRegistry and the real code of what is hooked, and nothing else."""
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.speculative", "sglang.version",
                 "sglang.srt.speculative.dflash_utils", "sglang.srt.speculative.dflash_worker_v2", "sglang.kernels",
                 "sglang.kernels.ops", "sglang.kernels.ops.speculative", "sglang.srt.models", MODELS):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    registry = by_path("sglang.srt.plugins.hook_registry", "srt/plugins/hook_registry.py")
    helper = by_path("sglang.kernels.ops.speculative.fused_kv_materialize", OPS + "fused_kv_materialize.py")
    walk = by_path(WALK, OPS + "dflash.py")
    for module in (registry, helper, walk):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["sglang.version"].__version__ = "0.5.23"
    worker, utils = (sys.modules[f"sglang.srt.speculative.dflash_{n}"] for n in ("worker_v2", "utils"))
    take("sglang", WORKER, ["_DflashDraftSampler", "_selector_lattice", "_SelectorDraftSampler",
                            "DFlashWorkerV2._append_target_hidden_fused,_propose_selector_block"], worker.__dict__)
    worker.torch, worker.KVWriteLoc = torch, lambda loc, physical: loc
    take("sglang", "srt/speculative/dflash_utils.py",
         ["compute_dflash_sampling_correct_drafts_and_bonus", "build_speculative_verify_target_probs"], utils.__dict__)
    utils.torch, utils.F = torch, F
    # Its convolution and scores are compiled where it has a GPU's backend for that, and plain functions without.
    models = sys.modules[MODELS]
    vars(models).update(torch=torch, nn=nn, F=F, _is_npu=True, get_compiler_backend=lambda: "eager",
                        _flashinfer_top_k=torch.topk, selector_walk_triton=walk.selector_walk_triton)
    take("sglang", "srt/models/dflash.py", ["_grouped_conv", "DFlashGroupedConv", "_score_edges", "_follow_maps",
                                            "CandidateSelector"], vars(models))
    monkeypatch.setenv("DFLASH_SGLANG_ENABLE", ",".join(ENABLED))
    monkeypatch.setattr(hooks, "MEASURED", (dflash_kernels.build_info()["isa"],))
    worker.compute_dflash_sampling_correct_drafts_and_bonus = utils.compute_dflash_sampling_correct_drafts_and_bonus
    return worker, utils, registry.HookRegistry


def said(engine):
    """Of each hook, when SGLang has imported its DFlash worker."""
    return {o.name: o.why for o in plugin.seen(engine[0])}


def loaded(engine):
    assert said(engine) == dict.fromkeys(ENABLED, "")


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
