"""SGLang's plugin. `sglang.srt.plugins` calls register() in each of its processes.

Nothing is replaced, and nothing of SGLang or torch imported, before SGLang imports its DFlash worker, which it does
only for a DFlash configuration. The hooks are then installed through its HookRegistry. Once SGLang imports its kernel
registry, the ops' names are entered there.
"""

import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..watch import when_imported

if TYPE_CHECKING:
    from ..hooks import Hook, Outcome

LOG = logging.getLogger("sglang.dflash_kernels")
PREFIX = "DFLASH_SGLANG"


def hooks() -> tuple["Hook", ...]:
    from . import context, conv, head, sampling, selector

    return context.HOOK, head.HOOK, sampling.HOOK, conv.HOOK, selector.HOOK


def register() -> None:
    """Waits for a DFlash configuration, then installs the hooks (see docs/engines.md). Never raises, and can be called
    again.

    `DFLASH_SGLANG_DISABLE=name,...` disables single hooks; `DFLASH_SGLANG_ENABLE` enables hooks that are off by
    default.
    """
    when_imported("sglang.srt.speculative.dflash_worker_v2", seen, LOG)
    when_imported("sglang.kernels", _enter, LOG)


def _enter(kernels: ModuleType) -> None:
    from . import registry

    registry.enter(kernels)


def seen(_worker: ModuleType) -> list["Outcome"]:
    """Installs the active hooks through SGLang's HookRegistry, once per process."""
    import sglang.version
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ..hooks import MARK, Choice, install, platform_of
    from .registry import NAMES

    placed: list[str] = []

    def place(target: str, _owner: Any, _attribute: str, _original: Callable, replacement: Callable) -> None:
        placed.append(target.replace(":", "."))
        HookRegistry.register(placed[-1], replacement, HookType.REPLACE)

    if any(hasattr(function, MARK) for given in HookRegistry._hooks.values() for _, function, _ in given):
        return []  # the plugin was loaded before in this process
    every = hooks()
    choice = Choice.of(os.environ, PREFIX, [*(hook.name for hook in every), *NAMES], LOG)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcomes = install(every, sglang.version.__version__, platform_of(device), choice, LOG, place)
    # Ours alone: the worker may be imported while the registry applies, or plugins still register, the hooks of others.
    for target in placed:
        if target not in HookRegistry._patched:
            HookRegistry._apply_target(target, HookRegistry._hooks[target])
            HookRegistry._patched.add(target)
    return outcomes
