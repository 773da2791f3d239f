"""Our ops as SGLang's kernel registry takes them: entries with the backend PLUGIN, which name a function each.

SGLang 0.5.23 has two contracts for plugins. `sglang.kernels.registry` lists functions by op and backend, and a caller
picks one with `get_kernel(op, KernelBackend.PLUGIN)`. Ours are there under `dflash.<op>`, with our arguments. Under two
of SGLang's own names, with SGLang's arguments, they are entered on request only: a caller who names no backend is
refused where several fit.

`sglang.kernels.plugin_kernels` is for libraries that replace a model's whole forward pass. No part of SGLang reads its
declarations for single functions. `declarations` states ours in its terms, so that a maintainer can compare.
"""

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..hooks import named_in

LOG = logging.getLogger("sglang.dflash_kernels")
PREFIX = "DFLASH_SGLANG"
READ = "0.5.23"
NAMES = ("registry", "shared_ops")  # in DFLASH_SGLANG_ENABLE and _DISABLE
API_VERSION = 1  # of plugin_kernels, in that release
FIELDS = ("op", "backend", "target", "capabilities")
OPS = ("add_rms_norm", "block_attention", "combine_argmax", "combine_topk", "embed_tokens", "expert_mlp",
       "grouped_conv", "grouped_conv_add_rms_norm", "linear", "lm_head_argmax", "lm_head_topk", "prepare_block",
       "qk_norm_rope", "rms_norm", "route_experts", "sample_draft", "select_candidates", "silu_and_mul",
       "verify_greedy", "verify_sample", "write_context_kv")
SHARED = ("speculative.compute_dflash_correct_drafts_and_bonus", "activation.silu_and_mul")
# Integers, and rows that are copied: equal to SGLang's to the bit. Sums of floats are taken in another order or rounded
# at another place than SGLang's, so that their bits do not depend on the batch but need not be SGLang's.
EXACT = frozenset({"combine_argmax", "combine_topk", "prepare_block", "verify_greedy", SHARED[0]})
BUDGET = {"times the largest error of the torch expression": 2.0, "units in the last place": 1.0}
ISAS = frozenset({"sm_80", "sm_90", "sm_100", "sm_120"})
DTYPES = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True)
class Declaration:
    """spec: SGLang's KernelSpec. The others are what plugin_kernels' contract asks of a plugin, as objects of it."""

    spec: Any
    requires: Any
    features: frozenset
    numerics: Any
    api_version: int = API_VERSION


def specs(kernels: Any, shared: bool) -> list[Any]:
    """The KernelSpecs. kernels: `sglang.kernels`."""
    known = tuple(getattr(kernels.KernelSpec, "__struct_fields__", ()))
    if known != FIELDS or not hasattr(kernels.KernelBackend, "PLUGIN"):
        raise TypeError(f"KernelSpec must have the fields {', '.join(FIELDS)} and a backend PLUGIN; got "
                        f"{', '.join(known)}")
    where = {f"dflash.{op}": f"dflash_kernels:{op}" for op in OPS}
    if shared:
        where |= {op: f"{__package__}.shared:{op.partition('.')[2]}" for op in SHARED}
    able = frozenset({kernels.CapabilityRequirement.cuda(min_sm=(8, 0)),
                      kernels.CapabilityRequirement(device=kernels.DeviceType.CPU)})
    return [kernels.KernelSpec(op=op, backend=kernels.KernelBackend.PLUGIN, target=target, capabilities=able)
            for op, target in where.items()]


def enter(kernels: ModuleType) -> None:
    """Enters the ops into SGLang's registry, which imports nothing. Writes one line to the log."""
    import sglang.version

    disabled, enabled = (named_in(os.environ, f"{PREFIX}_{end}") for end in ("DISABLE", "ENABLE"))
    version = sglang.version.__version__
    if "registry" in disabled:
        why = f"disabled by {PREFIX}_DISABLE"
    elif version.partition("+")[0] != READ:
        why = f"version {version} was not read; {READ} was"
    elif importlib.util.find_spec("triton") is None:
        why = "triton, which the GPU kernels are written in, is missing; pip install triton"
    else:
        shared = "shared_ops" in enabled - disabled
        for spec in specs(kernels, shared):
            kernels.register_kernel(spec)
        LOG.info("dflash-kernels: registry: %s ops entered%s", len(OPS), f", and {', '.join(SHARED)}" * shared)
        return
    LOG.info("dflash-kernels: registry: nothing entered, %s", why)


def declarations(kernels: Any, contract: Any) -> list[Declaration]:
    """What each op states. kernels: `sglang.kernels`. contract: `sglang.kernels.plugin_kernels.nvidia.spec`.

    Raises TypeError where the contract is another than the one that was read.
    """
    version = getattr(contract, "MEGAKERNEL_API_VERSION", None)
    if version != API_VERSION:
        raise TypeError(f"SGLang's plugin API must have version {API_VERSION}; got {version}")
    kind = contract.NumericsKind
    features = frozenset({contract.Feature.SPECULATIVE_DECODING, contract.Feature.DETERMINISTIC_INFERENCE})
    requires = contract.Requirements(isas=ISAS, tp_sizes=frozenset(), dtypes=DTYPES)

    def numerics(op: str) -> Any:
        exact = op.removeprefix("dflash.") in EXACT
        tolerances: Mapping[str, float] = {} if exact else BUDGET
        return contract.Numerics(kind=kind.BITWISE if exact else kind.TOLERANCE, tolerances=tolerances)

    return [Declaration(spec, requires, features, numerics(spec.op)) for spec in specs(kernels, shared=True)]

