"""vLLM's plugin: `vllm.general_plugins` calls register() in each of its processes."""

import logging
import os

from ..hooks import Hook, Outcome, install

LOG = logging.getLogger("vllm.dflash_kernels")  # under "vllm" its handlers and level apply


def hooks() -> tuple[Hook, ...]:
    from . import attention, context, head, verify, verify_v2

    return context.HOOK, attention.HOOK, head.HOOK, verify.HOOK, verify_v2.HOOK


def register() -> list[Outcome]:
    """Replaces what dflash_kernels covers; see docs/engines.md. Never raises, and may be called again.

    `DFLASH_VLLM_DISABLE=name,...` leaves single hooks out, `DFLASH_VLLM_ENABLE` brings in what is off by itself.
    """
    try:
        import vllm

        return install(hooks(), vllm.__version__, os.environ, "DFLASH_VLLM", LOG)
    except Exception as error:
        LOG.warning("dflash-kernels: nothing replaced, %s: %s", type(error).__name__, error)
        return []
