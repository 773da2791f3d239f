"""The drafter's attention -> block_attention, through vLLM's registry of attention backends. vLLM's V1 runner.

The backend is registered under NAME on every platform; vLLM takes it for the drafter alone where the speculative
configuration names it ("attention_backend"). Its CPU platform takes no backend but its own, so there the function that
says which one is wrapped, and gives ours to layers whose configuration is that of a DFlash drafter.
"""

import inspect
import logging
from typing import Any

import torch

from ..hooks import Hook

LOG = logging.getLogger("vllm.dflash_kernels")
NAME, CLASS = "DFLASH", "dflash_decode.engines.vllm.attention_backend.DFlashAttentionBackend"
REGISTER = ("backend", "class_path", "is_mamba")


def enter_registry() -> None:
    """Enters the backend's name in vLLM's registry, once; raises where that is not the one that we know."""
    from vllm.v1.attention.backends import registry

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


def build(original):
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        from vllm.config import get_current_vllm_config

        if not is_drafter(get_current_vllm_config(), selected_backend, attn_selector_config):
            return original(cls, selected_backend, attn_selector_config, num_heads)
        from .attention_backend import DFlashAttentionBackend

        reasons = DFlashAttentionBackend.validate_configuration(device_capability=None,
                                                                **attn_selector_config._asdict())
        LOG.info("dflash-kernels: attention: %s for this model", f"left, {', '.join(reasons)}" if reasons else "in use")
        return original(cls, None, attn_selector_config, num_heads) if reasons else CLASS

    return get_attn_backend_cls


def off() -> str | None:
    return None if torch.cuda.is_available() else "slower than the engine's own on a CPU"


def keep() -> str | None:
    """On a GPU nothing is wrapped: there the engine takes any backend of its registry that somebody names."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    return f'not run on a GPU yet; "attention_backend": "{NAME}" in the speculative configuration asks for it'


HOOK = Hook("attention", "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
            (("selected_backend", "attn_selector_config", "num_heads"),), ((0, 32), (0, 34)), build, keep, off,
            enter_registry)
