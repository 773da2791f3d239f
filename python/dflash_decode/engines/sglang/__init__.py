"""SGLang's plugin: `sglang.srt.plugins` calls register() in each of its processes, then applies what it registered."""

import logging
import os
from collections.abc import Callable
from typing import Any

from ..hooks import Hook, Outcome, install

LOG = logging.getLogger("sglang.dflash_kernels")


def hooks() -> tuple[Hook, ...]:
    from . import context, head, sampling

    return context.HOOK, head.HOOK, sampling.HOOK


def register() -> list[Outcome]:
    """Hands our replacements to SGLang's HookRegistry; see docs/engines.md. Never raises, and may be called again.

    `DFLASH_SGLANG_DISABLE=name,...` leaves single hooks out, `DFLASH_SGLANG_ENABLE` brings in what is off by itself.
    """
    try:
        import sglang.version
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        def place(hook: Hook, _owner: Any, _attribute: str, _original: Callable, replacement: Callable) -> None:
            target = hook.target.replace(":", ".")
            if not any(function.__dict__.get("dflash_original") for _, function, _ in HookRegistry._hooks[target]):
                HookRegistry.register(target, replacement, HookType.REPLACE)

        return install(hooks(), sglang.version.__version__, os.environ, "DFLASH_SGLANG", LOG, place)
    except Exception as error:
        LOG.warning("dflash-kernels: nothing replaced, %s: %s", type(error).__name__, error)
        return []
