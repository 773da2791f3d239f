"""SGLang's plugin: `sglang.srt.plugins` calls register() in each of its processes.

Nothing is replaced, and nothing of SGLang or torch imported, before SGLang imports its DFlash worker, which it does for
a DFlash configuration alone. Then our replacements go through its HookRegistry.
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
    from . import context, head, sampling

    return context.HOOK, head.HOOK, sampling.HOOK


def register() -> None:
    """Waits for a DFlash configuration, and then replaces what dflash_kernels covers; see docs/engines.md. Never
    raises, and may be called again.

    `DFLASH_SGLANG_DISABLE=name,...` leaves single hooks out, `DFLASH_SGLANG_ENABLE` brings in what is off by itself.
    """
    when_imported("sglang.srt.speculative.dflash_worker_v2", seen, LOG)


def seen(_worker: ModuleType) -> list["Outcome"]:
    """Hands what is on to SGLang's HookRegistry, once in a process."""
    import sglang.version
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ..hooks import MARK, Choice, install, platform_of

    def place(hook: "Hook", _owner: Any, _attribute: str, _original: Callable, replacement: Callable) -> None:
        HookRegistry.register(hook.target.replace(":", "."), replacement, HookType.REPLACE)

    if any(hasattr(function, MARK) for given in HookRegistry._hooks.values() for _, function, _ in given):
        return []  # the plugin was loaded before in this process
    every = hooks()
    choice = Choice.of(os.environ, PREFIX, [hook.name for hook in every], LOG)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcomes = install(every, sglang.version.__version__, platform_of(device), choice, LOG, place)
    HookRegistry.apply_hooks()
    return outcomes
