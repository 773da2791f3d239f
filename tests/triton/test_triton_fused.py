"""README's table of ops: how many kernels each launches on a GPU."""

import re
from dataclasses import fields, is_dataclass

import pytest
import torch

import dflash_kernels as dk
from tests.support import ROOT
from tests.support.op_samples import SAMPLES, int32

pytest.importorskip("triton")

from tests.support.launches import launches  # noqa: E402

TABLE = re.findall(r"^\| `(\w+)` \| (\d)(?: for all draft layers)?(?: to (\d)|; (\d) for few \w+)? \|",
                   (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if is_dataclass(value):
        return type(value)(**{f.name: on_meta(getattr(value, f.name)) for f in fields(value)})
    return [on_meta(each) for each in value] if isinstance(value, list) else value


def wide(op):
    """Calls whose shapes share work among more programs than the samples' do."""
    if op == "block_attention":  # one request over a long context
        cache = dk.PagedKV(torch.zeros(64, 64, 1, 64), torch.zeros(64, 64, 1, 64))
        q, k = torch.zeros(1, 8, 2, 64), torch.zeros(1, 8, 1, 64)
        return [{"q": q, "k": k, "v": k, "cache": cache, "page_table": torch.zeros(1, 64, dtype=torch.int32),
                 "context_lens": int32(4000)}]
    if op == "linear":  # few rows, few columns, a long sum
        return [{"x": torch.zeros(1, 8192, dtype=torch.bfloat16),
                 "weight": dk.pack_weight(torch.zeros(256, 8192, dtype=torch.bfloat16))}]
    if op == "write_context_kv":  # as many layers as a published drafter has, and more
        return [{"kv": torch.zeros(4, layers * 16), "positions": torch.arange(4), "slots": torch.arange(4),
                 "caches": [dk.PagedKV(torch.zeros(4, 4, 1, 8), torch.zeros(4, 4, 1, 8)) for _ in range(layers)],
                 "cos_sin": torch.zeros(12, 4)} for layers in (1, 8, 64)]
    return []


def counted(op):
    """Launches of each call. verify_greedy from logits is two ops in one, and has the head's argmax before it."""
    samples = [s.arguments() for name, s in SAMPLES.items() if s.function is getattr(dk, op)
               and name != "verify_greedy_logits"]
    found = set()
    for arguments in [*samples, *wide(op)]:
        with launches() as noted:
            getattr(dk, op)(**{name: on_meta(value) for name, value in arguments.items()})
        found.add(len(noted))
    return found


def test_the_table_has_the_ops_of_a_step():
    assert {op for op, *_ in TABLE} >= {"prepare_block", "add_rms_norm", "qk_norm_rope", "silu_and_mul", "linear",
                                        "block_attention", "lm_head_argmax", "verify_greedy", "verify_sample",
                                        "write_context_kv"}


@pytest.mark.parametrize("op, least, most, few", TABLE)
def test_launches_are_as_readme_says(op, least, most, few):
    found = counted(op)
    assert (min(found), max(found)) == (int(least), int(most or few or least))
