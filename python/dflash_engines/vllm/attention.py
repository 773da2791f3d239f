"""The drafter's attention -> block_attention, through vLLM's registry of attention backends. vLLM's V1 runner.

The backend is registered under NAME on every platform; vLLM takes it for the drafter alone where the speculative
configuration names it ("attention_backend"). Its CPU platform takes no backend but its own, so there the function that
says which one is wrapped, and gives ours to layers whose configuration is that of a DFlash drafter.
"""

import inspect
from types import ModuleType
from typing import Any

from ..hooks import LEFT, Hook
from .backend_name import LOG, NAME

CLASS = "dflash_engines.vllm.attention_backend.DFlashAttentionBackend"
REGISTER = ("backend", "class_path", "is_mamba")


def enter(registry: ModuleType) -> None:
    """Enters the backend's name in vLLM's registry, once; raises where that is not the one that we know."""
    found = tuple(inspect.signature(registry.register_backend).parameters)
    if found != REGISTER:
        raise TypeError(f"register_backend takes {', '.join(found)}")
    if NAME not in registry.AttentionBackendEnum.__members__:
        registry.register_backend(NAME, CLASS)


def is_drafter(config: Any, selected: Any, layer: Any) -> bool:
    """Whether nobody chose a backend for this layer, and it is a DFlash drafter's. config: the VllmConfig that the
    model is made with. layer: vLLM's AttentionSelectorConfig; it asks for attention that is not causal in drafters
    alone."""
    speculative = getattr(config, "speculative_config", None)
    named = selected is not None and selected.name == NAME
    return named or (selected is None and layer.use_non_causal and getattr(speculative, "method", None) == "dflash")


def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
    from vllm.config import get_current_vllm_config

    if not is_drafter(get_current_vllm_config(), selected_backend, attn_selector_config):
        return LEFT
    from .attention_backend import DFlashAttentionBackend

    reasons = DFlashAttentionBackend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
    LOG.info("dflash-kernels: attention: %s",
             f"not active for this model, {', '.join(reasons)}" if reasons else "active for this model")
    return LEFT if reasons else CLASS


def keep() -> str | None:
    """On a GPU nothing is wrapped: there the engine takes any backend of its registry that somebody names."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        return None if NAME in AttentionBackendEnum.__members__ else f"the engine's registry has no {NAME}"
    return f'"attention_backend": "{NAME}" in the speculative configuration asks for it'


HOOK = Hook("attention", "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls", get_attn_backend_cls,
            read={"0.32.0": "e0e5d9d19c023dd9", "0.33.0": "c10ec67a457e7c78"}, measured={"cpu": False}, keep=keep)
