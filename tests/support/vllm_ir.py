"""Runs in an environment that has vLLM, on its own IR ops: what is there of ours, and how far apart, as JSON.

    python -m tests.support.vllm_ir
"""

import importlib
import json

import torch
import vllm
from vllm import ir

from dflash_engines import vllm as plugin


def main() -> None:
    plugin.register()
    before = [sorted(op.impls) for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)]
    importlib.import_module("vllm.kernels")  # as the engine's worker does before it sets priorities
    found = {"version": vllm.__version__, "before": before}
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        arguments = op.generate_inputs(num_tokens=9, hidden_size=576, dtype=torch.bfloat16)
        expected = op.impls["native"].impl_fn(*arguments)
        with op.set_priority(["dflash", "native"]):
            chosen, made = op.dispatch(*arguments).provider, op(*arguments)
        torch.testing.assert_close(made, expected, **op.get_tolerance(torch.bfloat16))
        found[op.name] = [chosen, op.dispatch(*arguments).provider]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
