"""Triton kernels, one file per noun. Nothing here imports triton until an op is first called on a GPU.

A noun's module has the kernels, one table of launch configurations and a launcher per op with the arguments of the op's
schema. Every kernel as every configuration compiles it, for the tests that have no GPU: the launches that
tools/aot/launched.py records.

Integers that change from step to step (rows, a block's width, a table's) are not specialised on: triton would compile a
kernel anew when one of them is 1 or begins to divide by 16, in the midst of serving, and a row would meet other code.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping

import torch

LAUNCHERS = {  # op: module:function
    "rms_norm": "norm:rms_norm",
    "add_rms_norm": "norm:add_rms_norm",
    "grouped_conv": "conv:grouped_conv",
    "grouped_conv_add_rms_norm": "conv:grouped_conv_add_rms_norm",
    "silu_and_mul": "activation:silu_and_mul",
    "qk_norm_rope": "rope:qk_norm_rope",
    "write_context_kv": "context:write_context_kv",
    "prepare_block": "block:prepare_block",
    "embed_tokens": "block:embed_tokens",
    "verify_greedy": "verify:verify_greedy",
    "verify_sample": "sample:verify_sample",
    "sample_draft": "sample:sample_draft",
    "select_candidates": "selector:select_candidates",
    "route_experts": "router:route_experts",
    "expert_mlp": "experts:expert_mlp",
    "linear": "linear:linear",
    "lm_head_argmax": "lm_head:lm_head_argmax",
    "combine_argmax": "lm_head:combine_argmax",
    "lm_head_topk": "lm_head_topk:lm_head_topk",
    "combine_topk": "lm_head_topk:combine_topk",
    "block_attention": "attention:block_attention",
}


installed = False  # whether ops on CUDA tensors come here


def found() -> bool:
    """Whether there is something called triton to import, which is not done here. Whether it loads, `problem` says."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # somebody put a module without a spec in its place
        return True


@functools.cache
def problem() -> str | None:
    """Why these kernels cannot run, or None where they can. Imports triton, which may fail in any way: with what it
    finds on the machine, with another version of torch, with a package of the same name."""
    what = "triton, which the GPU kernels are written in,"
    try:
        triton, language = map(importlib.import_module, ("triton", "triton.language"))
        for module, name in ((triton, "jit"), (triton, "cdiv"), (language, "constexpr")):
            getattr(module, name)  # a folder of that name is a package too
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return f"{what} is missing; pip install triton"
        return f"{what} does not load: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: an import that gives up must not end the process
        return f"{what} does not load: {type(error).__name__}: {error}"
    return None


@functools.cache
def load(where: str) -> Callable:
    module, function = where.split(":")
    importlib.import_module("._cache", __name__).prepare()
    return getattr(importlib.import_module(f".{module}", __name__), function)


def _on_its_device(op: str, fallbacks: Mapping[str, Callable]) -> Callable:
    """The dispatcher does not change devices for a Python kernel, and triton launches on the current one."""

    def launch(*args):
        kernel = fallbacks[op] if problem() else load(LAUNCHERS[op])
        device = args[0].get_device()
        if device == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    return launch


def install(lib: torch.library.Library, fallbacks: Mapping[str, Callable], without: Collection[str] = ()) -> None:
    """Registers every launcher for CUDA tensors, but not those of the ops in `without`. Where triton does not load,
    which is known when it is first needed, fallbacks[op] answers instead."""
    global installed
    installed = True
    for op in LAUNCHERS:
        if op not in without:
            lib.impl(op, _on_its_device(op, fallbacks), "CUDA")
