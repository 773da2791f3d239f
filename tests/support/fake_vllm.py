"""The parts of vLLM's V1 runner that our hooks touch, small enough to read, with its names, layouts and roundings."""

import dataclasses
import enum
import sys
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F

import dflash_kernels
from dflash_engines import hooks, sources
from dflash_engines import vllm as plugin
from dflash_engines.vllm import conv
from tests.support import fake_dflash2

LAYERS, KV_HEADS, HEAD_DIM, HIDDEN, PAGE, PAGES, VOCAB, DRAFTED = 3, 2, 16, 32, 4, 6, 50, 3


def rms_norm(out, x, weight, eps):
    """As torch.ops._C.rms_norm: weight (D,), or a row of it for each of the outermost dimension."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    while 1 < weight.dim() < x.dim():
        weight = weight.unsqueeze(1)
    out.copy_((normed * weight.float()).to(x.dtype))


class Backend:
    """As on a CPU. The real one keeps a page in tiles, which our hook does not look into."""

    name = "CPU_ATTN"

    @classmethod
    def get_name(cls):
        return cls.name


class Layer:
    """An attention layer with its cache (pages, Hkv, P, 2 * D): keys, then values, in the last dimension. scales: of an
    fp8 cache, kept as bytes."""

    attn_backend = Backend

    def __init__(self, dtype, heads_first, scales=None):
        shape, self.kv_cache_dtype = (PAGES, KV_HEADS, PAGE, 2 * HEAD_DIM), "auto" if scales is None else "fp8"
        self._k_scale, self._v_scale = torch.tensor(scales or (1.0, 1.0))
        dtype = dtype if scales is None else torch.uint8
        self.kv_cache = torch.zeros(shape, dtype=dtype) if heads_first else torch.zeros(
            PAGES, PAGE, KV_HEADS, 2 * HEAD_DIM, dtype=dtype).transpose(1, 2)
        self.impl = self

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        there = slots >= 0
        slots = slots[there]
        if self.kv_cache_dtype == "fp8":
            key, value = (torch.clamp(x.float() / scale, -448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
                          for x, scale in ((key, layer._k_scale), (value, layer._v_scale)))
        kv_cache[slots // PAGE, :, slots % PAGE] = torch.cat([key[there], value[there]], -1).to(kv_cache.dtype)


def config(method="dflash"):
    return types.SimpleNamespace(speculative_config=types.SimpleNamespace(method=method), use_v2_model_runner=False)


class DFlashQwen3Model:
    def __init__(self, dtype=torch.float32, heads_first=True, v_scale=None, neox=True, method="dflash", scales=None):
        """v_scale: of all layers, or a list. scales: of each layer's fp8 cache, K's and V's."""
        self.vllm_config = config(method)
        g = torch.Generator().manual_seed(5)

        def weight(*shape):
            return torch.randn(shape, generator=g).to(dtype)

        self._num_attn_layers, self._num_kv_heads, self._head_dim, self._kv_size = (
            LAYERS, KV_HEADS, HEAD_DIM, KV_HEADS * HEAD_DIM)
        self._hidden_norm_weight, self._k_norm_weights = weight(HIDDEN), weight(LAYERS, HEAD_DIM)
        self._fused_kv_weight = weight(LAYERS * 2 * self._kv_size, HIDDEN)
        self._fused_kv_bias = weight(LAYERS * 2 * self._kv_size)
        self._rms_norm_eps, self._rope_head_size, self._rope_is_neox = 1e-6, HEAD_DIM, neox
        angles = torch.arange(64)[:, None] * torch.tensor([0.5 ** i for i in range(HEAD_DIM // 2)])
        self._rope_cos_sin_cache = torch.cat([angles.cos(), angles.sin()], -1)
        self._attn_layers = [Layer(dtype, heads_first, pair) for pair in scales or [None] * LAYERS]
        self.layers = [types.SimpleNamespace(self_attn=types.SimpleNamespace(v_scale=scale))
                       for scale in (v_scale if isinstance(v_scale, list) else [v_scale] * LAYERS)]
        self.calls = 0

    def _project_context_kv(self, states):
        normed = torch.empty_like(states)
        rms_norm(normed, states, self._hidden_norm_weight, self._rms_norm_eps)
        kv = F.linear(normed, self._fused_kv_weight, self._fused_kv_bias)
        return kv.view(-1, LAYERS, 2, KV_HEADS, HEAD_DIM).permute(2, 1, 0, 3, 4)

    def _normalize_context_k(self, k):
        out = torch.empty_like(k)
        rms_norm(out, k, self._k_norm_weights, self._rms_norm_eps)
        return out

    def precompute_and_store_context_kv(self, context_states, context_positions, context_slot_mapping=None):
        self.calls += 1
        k, v = self._project_context_kv(context_states)
        k = self._normalize_context_k(k.contiguous())
        table = self._rope_cos_sin_cache.to(k.dtype)[context_positions][:, None].float()
        cos, sin = table.chunk(2, -1)
        a, b = (k.float().chunk(2, -1) if self._rope_is_neox else (k.float()[..., ::2], k.float()[..., 1::2]))
        parts = (a * cos - b * sin, b * cos + a * sin)
        k = (torch.cat(parts, -1) if self._rope_is_neox else torch.stack(parts, -1).flatten(-2)).to(k.dtype)
        if context_slot_mapping is None:
            return
        scale = self.layers[0].self_attn.v_scale
        v = v if scale is None else (v.float() * scale).to(v.dtype)
        for i, layer in enumerate(self._attn_layers):
            each = isinstance(context_slot_mapping, list)
            slots = context_slot_mapping[i] if each else context_slot_mapping
            if slots is not None:
                layer.impl.do_kv_cache_update(layer, k[i], v[i], layer.kv_cache, slots)


class DFlashQwen3ForCausalLM:
    def compute_logits(self, hidden_states):
        return self.logits_processor(self.lm_head, hidden_states)


class UnquantizedEmbeddingMethod:
    pass


class SpecDecodeBaseProposer:
    def __init__(self, vllm_config, device, runner=None, offsets=None, dtype=torch.float32, **changes):
        g = torch.Generator().manual_seed(7)
        weight = torch.randn(VOCAB + 6, HIDDEN, generator=g).to(dtype)
        weight[VOCAB:] *= 100  # padding that would win
        self.dtype, self.use_local_argmax_reduction, self.use_heterogeneous_vocab = dtype, False, False
        self.model = types.SimpleNamespace(
            draft_id_to_target_id=offsets, compute_logits=self.logits,
            lm_head=types.SimpleNamespace(weight=weight, tp_size=1, quant_method=UnquantizedEmbeddingMethod()),
            logits_processor=types.SimpleNamespace(soft_cap=None, scale=1.0, logits_as_input=False,
                                                   org_vocab_size=VOCAB, head_dtype=None))
        for path, value in changes.items():
            *owners, name = path.split("__")
            owner = self
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, name, value)

    def logits(self, hidden):
        found, offsets = F.linear(hidden, self.model.lm_head.weight)[:, :VOCAB], self.model.draft_id_to_target_id
        if offsets is None:
            return found
        whole = found.new_full((len(hidden), 4 * VOCAB), -torch.inf)
        whole[:, torch.arange(VOCAB) + offsets] = found
        return whole

    def load_model(self, target_model):
        self.target_model = target_model

    def _greedy_sample(self, hidden_states):
        return self.model.compute_logits(hidden_states).argmax(-1)


class Runner:
    """A model runner, by its batch: sampling metadata are made anew whenever requests come or go."""

    def __init__(self, all_greedy=True):
        metadata = types.SimpleNamespace(all_greedy=all_greedy, calls=0)
        self.input_batch = types.SimpleNamespace(sampling_metadata=metadata)


def make(proposer, *args, method="dflash", device="cpu", runner=None, **kwargs):
    """As the engine makes its proposer."""
    return proposer(config(method), torch.device(device), runner, *args, **kwargs)


class RejectionSampler:
    """The V2 runner's."""

    def __init__(self, sampler, spec_config, device):
        self.sampler = sampler


def rejection_sample(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits,
                     bonus_token_ids, sampling_metadata, synthetic_mode=False, synthetic_conditional_rates=None,
                     use_fp64_gumbel=False):
    sampling_metadata.calls += 1
    out = torch.full((len(num_draft_tokens), max_spec_len + 1), -1, dtype=torch.int32)
    answers, start = target_logits.argmax(-1).tolist(), 0
    for b, n in enumerate(num_draft_tokens):
        for i in range(n):
            out[b, i] = answers[start + i]
            if answers[start + i] != draft_token_ids[start + i]:
                break
        else:
            out[b, n] = bonus_token_ids.flatten()[b]  # (B, 1) or (B,)
        start += n
    return out


class AttentionBackend:
    supported_dtypes, supported_kv_cache_dtypes = [], []

    @classmethod
    def supports_batch_invariance(cls):
        return False

    @classmethod
    def validate_configuration(cls, device_capability, dtype, kv_cache_dtype, has_sliding_window=False,
                               use_non_causal=False, use_batch_invariant=False, **rest):
        """The real one asks so for each of twenty things."""
        no = [dtype not in cls.supported_dtypes and "dtype", kv_cache_dtype not in cls.supported_kv_cache_dtypes
              and "kv_cache_dtype", has_sliding_window and not getattr(cls, "supports_sliding_window", bool)()
              and "sliding window", use_non_causal and not cls.supports_non_causal() and "non-causal attention",
              use_batch_invariant and not cls.supports_batch_invariance() and "batch invariance"]
        return [f"{what} not supported" for what in no if what] + [
            why for why in [cls.supports_combination()] if why]


class AttentionMetadataBuilder:
    def __class_getitem__(cls, item):
        return cls

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.layer_names = layer_names


class AttentionImpl:
    def __class_getitem__(cls, item):
        return cls


class SelectorConfig(NamedTuple):
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: str = "auto"
    has_sliding_window: bool = False
    use_non_causal: bool = False
    use_batch_invariant: bool = False


def attention_modules(device):
    """vLLM's registry of backends, and the platform that says which one a layer gets."""
    names = enum.Enum("AttentionBackendEnum", {"CPU_ATTN": "CPU_ATTN"}, module="vllm.v1.attention.backends.registry")

    def register_backend(backend, class_path=None, is_mamba=False):
        if backend in names.__members__:
            raise ValueError(f"Backend {backend} already exists")
        names._member_map_[backend] = member = object.__new__(names)
        member._name_, member._value_ = backend, class_path

    class CpuPlatform:
        @classmethod
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
            return cls.__name__, getattr(selected_backend, "name", None)

    platform, current = types.SimpleNamespace(is_cpu=lambda: device == "cpu", dispatch_key="CPU"), config()
    return {
        "vllm.config": {"get_current_vllm_config": lambda: current, "current": current},
        "vllm.platforms": {"current_platform": platform}, "vllm.platforms.cpu": {"CpuPlatform": CpuPlatform},
        "vllm.v1.attention": {}, "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": {"AttentionBackendEnum": names, "register_backend": register_backend},
        "vllm.v1.attention.backend": {
            "AttentionBackend": AttentionBackend, "AttentionImpl": AttentionImpl,
            "AttentionMetadataBuilder": AttentionMetadataBuilder,
            "AttentionType": types.SimpleNamespace(DECODER="decoder")}}


def v2_rejection_sample(target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping,
                        expanded_idx_mapping, expanded_local_pos, temperature, seed, num_speculative_steps,
                        synthetic_conditional_rates=None, use_fp64=False, use_block_verification=False, contexts=None,
                        watermarking=None, watermarking_skip_mask=None, watermark_key=None):
    return "theirs"


def install(monkeypatch, version="0.32.0+cpu", device="cpu"):
    """Puts it where vLLM would be, and its sources into our hooks as those of a version that was read."""
    model, base, causal, sampler = (type(c.__name__, (c,), {}) for c in (
        DFlashQwen3Model, SpecDecodeBaseProposer, DFlashQwen3ForCausalLM, RejectionSampler))
    proposer, speculator = (type(name, (base,), {}) for name in ("DFlashProposer", "DFlashSpeculator"))
    gpu = "vllm.v1.worker.gpu.spec_decode"
    contents = {
        "vllm": {"__version__": version}, "vllm._custom_ops": {"rms_norm": rms_norm},
        "vllm.model_executor": {}, "vllm.model_executor.models": {},
        "vllm.model_executor.models.qwen3_dflash": {"DFlashQwen3Model": model, "DFlashQwen3ForCausalLM": causal},
        "vllm.v1": {}, "vllm.v1.spec_decode": {}, "vllm.v1.spec_decode.dflash": {"DFlashProposer": proposer},
        "vllm.v1.spec_decode.llm_base_proposer": {"SpecDecodeBaseProposer": base},
        "vllm.v1.sample": {}, "vllm.v1.sample.rejection_sampler": {"rejection_sample": rejection_sample},
        "vllm.v1.worker": {}, "vllm.v1.worker.gpu": {}, gpu: {}, f"{gpu}.dflash": {},
        f"{gpu}.dflash.speculator": {"DFlashSpeculator": speculator},
        f"{gpu}.rejection_sampler": {"RejectionSampler": sampler},
        f"{gpu}.rejection_sampler_utils": {"rejection_sample": v2_rejection_sample},
    } | attention_modules(device) | fake_dflash2.vllm_modules(base)
    monkeypatch.setattr(conv, "LIBRARIES", [])
    monkeypatch.setattr(hooks, "MEASURED", (dflash_kernels.build_info()["isa"],))
    for name, names in contents.items():
        module = types.ModuleType(name)
        module.__path__ = []
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for hook in plugin.hooks():
        read = {"0.32.0": sources.digest(sources.of_function(sources.resolve(s)[2]) for s in hook.sources)}
        monkeypatch.setattr(sys.modules[hook.ours.__module__], "HOOK", dataclasses.replace(hook, read=read))
    if device == "cuda":
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    return model, proposer, sys.modules["vllm.v1.sample.rejection_sampler"]


def running(monkeypatch):
    """An engine whose process has loaded the plugin: its model's class, a drafter, the sampler and the runner."""
    model, proposer, sampler = install(monkeypatch)
    plugin.register()
    runner = Runner()
    return types.SimpleNamespace(model=model, drafter=make(proposer, runner=runner), sampler=sampler, runner=runner)
