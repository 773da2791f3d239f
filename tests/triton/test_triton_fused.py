"""How many kernels an op launches on a GPU, as its docstring and README's table say."""

import re
from dataclasses import fields, is_dataclass

import pytest
import torch

import dflash_kernels as dk
from tests.support import ROOT
from tests.support.costs import cost_of
from tests.support.op_samples import SAMPLES, int32

pytest.importorskip("triton")

from tests.support.launches import launches  # noqa: E402

TABLE = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))


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
    if op == "grouped_conv_add_rms_norm":  # rows that are wider than a program
        x, base = torch.zeros(1, 2, 8208), torch.zeros(2, 8208)
        return [{"x": x, "delta": torch.zeros(1, 2, 2, 513), "base": base, "residual": x, "weight": base[0]}]
    if op == "expert_mlp":  # more pairs than gate_up's programs sort
        x, ids = torch.zeros(2049, 8), torch.zeros(2049, 1, dtype=torch.int32)
        return [{"x": x, "gate_up": torch.zeros(1, 8, 8), "down": torch.zeros(1, 8, 4), "ids": ids,
                 "weights": torch.zeros(2049, 1)}]
    return []


def counted(op):
    """Launches of each call."""
    samples = [s.arguments() for s in SAMPLES.values() if s.function is getattr(dk, op)]
    found = set()
    for arguments in [*samples, *wide(op)]:
        with launches() as noted:
            getattr(dk, op)(**{name: on_meta(value) for name, value in arguments.items()})
        found.add(len(noted))
    return found


def test_the_table_has_the_ops_of_a_step():
    assert {*TABLE} >= {"prepare_block", "add_rms_norm", "qk_norm_rope", "silu_and_mul", "linear", "block_attention",
                        "lm_head_argmax", "verify_greedy", "verify_sample", "write_context_kv"}


@pytest.mark.parametrize("op", TABLE)
def test_readme_has_the_docstring_s_launches(op):
    assert TABLE[op] == cost_of(op).launches


@pytest.mark.parametrize("op", dk.build_info()["ops"])
def test_launches_are_as_the_docstring_says(op):
    found, said = counted(op), [int(n) for n in re.findall(r"\d+", cost_of(op).launches)]
    assert (min(found), max(found)) == (min(said), max(said))


def test_linear_s_chunks_are_as_long_as_its_docstring_says():
    from dflash_kernels._triton import linear

    assert cost_of("linear").formulas[1].endswith(f"ceil(K / {linear.CHUNK})")
