"""vLLM's plugin. `vllm.general_plugins` calls register() in each of its processes.

No hook is installed, and nothing of vLLM or torch imported that vLLM has not, before it creates the proposer of a
DFlash configuration. Until then the plugin only wraps the initialisers of its proposer classes, once vLLM imports them,
and registers a name as an attention backend and another for implementations of its IR ops.
"""

import logging
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..watch import when_imported, when_made

if TYPE_CHECKING:
    from ..hooks import Hook, Outcome

LOG = logging.getLogger("vllm.dflash_kernels")  # under "vllm" its handlers and level apply
PREFIX = "DFLASH_VLLM"
V1 = ("context_kv", "attention", "draft_head", "verify")
V2 = ("context_kv", "verify_v2")
DFLASH2 = ("grouped_conv", "selector")  # besides V2's: its proposer is one of that class
REGISTRY = "vllm.v1.attention.backends.registry"
PROPOSERS = {"vllm.v1.spec_decode.dflash": ("DFlashProposer", V1),
             "vllm.v1.worker.gpu.spec_decode.dflash.speculator": ("DFlashSpeculator", V2),
             "vllm.v1.worker.gpu.spec_decode.dflash2.speculator": ("DFlash2Speculator", DFLASH2)}


def hooks() -> tuple["Hook", ...]:
    from . import attention, context, conv, head, selector, verify, verify_v2

    return (context.HOOK, attention.HOOK, head.HOOK, verify.HOOK, verify_v2.HOOK, conv.HOOK, selector.HOOK)


def register() -> None:
    """Waits for a DFlash configuration, then installs the hooks (see docs/engines.md). Never raises, and can be called
    again.

    `DFLASH_VLLM_DISABLE=name,...` disables single hooks; `DFLASH_VLLM_ENABLE` enables hooks that are off by default.
    """
    for module in PROPOSERS:
        when_imported(module, _watch, LOG)
    when_imported(REGISTRY, _enter, LOG)
    when_imported("vllm.kernels", _offer, LOG)


def _watch(module: ModuleType) -> None:
    when_made(getattr(module, PROPOSERS[module.__name__][0]),
              lambda arguments: seen(arguments, PROPOSERS[module.__name__][1]), LOG)


def seen(arguments: Mapping[str, Any], names: tuple[str, ...]) -> list["Outcome"]:
    """Installs the hooks if the proposer is DFlash's: methods derived from DFlash use the same class.

    arguments: of a vLLM proposer, by name. names: the hooks for its runner.
    """
    if arguments["vllm_config"].speculative_config.method != "dflash":
        return []
    from ..hooks import Choice, install, platform_of
    from . import verify

    if arguments.get("runner") is not None:
        verify.RUNNERS.add(arguments["runner"])
    every = hooks()
    choice = Choice.of(os.environ, PREFIX, [hook.name for hook in every], LOG)
    if names != DFLASH2 and (others := choice.enabled.difference(names, DFLASH2 if names == V2 else ())):
        LOG.warning("dflash-kernels: %s_ENABLE must be names of this model runner's hooks, %s; got %s", PREFIX,
                    ",".join(names), ",".join(sorted(others)))
    return install([hook for hook in every if hook.name in names], sys.modules["vllm"].__version__,
                   platform_of(arguments["device"]), choice, LOG)


def _enter(registry: ModuleType) -> None:
    """Registers our attention backend early, because a configuration that names it can be read before there is a
    proposer."""
    from . import attention

    if not attention.HOOK.unread(sys.modules["vllm"].__version__):
        attention.enter(registry)


def _offer(kernels: ModuleType) -> None:
    from . import ir_ops

    ir_ops.enter(kernels)
