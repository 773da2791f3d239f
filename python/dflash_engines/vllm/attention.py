"""The drafter's attention -> block_attention, through vLLM's registry of attention backends. vLLM's V1 runner.

The backend is registered under NAME on every platform. vLLM uses it for the drafter only, where the speculative
configuration names it ("attention_backend"). Its CPU platform accepts no backend but its own. There the function that
selects the backend is wrapped, and returns ours for layers whose configuration is that of a DFlash drafter.
"""

import inspect
from types import ModuleType
from typing import Any

from ..hooks import LEFT, Hook
from .backend_name import LOG, NAME

CLASS = "dflash_engines.vllm.attention_backend.DFlashAttentionBackend"
REGISTER = ("backend", "class_path", "is_mamba")


def enter(registry: ModuleType) -> None:
    """Registers the backend in vLLM, once. Raises if the registry is not the known one."""
    found = tuple(inspect.signature(registry.register_backend).parameters)
    if found != REGISTER:
        raise TypeError(f"register_backend takes {', '.join(found)}")
    if NAME not in registry.AttentionBackendEnum.__members__:
        registry.register_backend(NAME, CLASS)
        registry.AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (restored, ())


def restored() -> Any:
    """The backend's member of vLLM's registry, where it is unpickled. vLLM hands a configuration that names it to
    processes which have not loaded their plugins yet."""
    from vllm.v1.attention.backends import registry

    enter(registry)
    return registry.AttentionBackendEnum[NAME]


def is_drafter(config: Any, selected: Any, layer: Any) -> bool:
    """Whether this layer belongs to a DFlash drafter and no other backend was chosen for it. config: the VllmConfig of
    the model. layer: vLLM's AttentionSelectorConfig, which asks for non-causal attention only in drafters."""
    speculative = getattr(config, "speculative_config", None)
    free = selected is None or selected.name == NAME
    return free and layer.use_non_causal and getattr(speculative, "method", None) == "dflash"


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
    """On a GPU nothing is wrapped: there the engine accepts any backend of its registry by name."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        return None if NAME in AttentionBackendEnum.__members__ else f"the engine's registry has no {NAME}"
    return f'"attention_backend": "{NAME}" in the speculative configuration asks for it'


HOOK = Hook("attention", "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls", get_attn_backend_cls,
            read={"0.32.0": "e0e5d9d19c023dd9", "0.33.0": "c10ec67a457e7c78"}, measured={"cpu": False}, keep=keep)
