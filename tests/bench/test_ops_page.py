"""docs/ops.md: every public name in its place, and no link that leads nowhere."""

import inspect
import re

import pytest

from bench.report import ops_page
from tests.support import ROOT

PAGE = ops_page.ops_page()
HEADINGS = [title for _, title in re.findall(r"^(#+) (.+)$", re.sub(r"```.*?```", "", PAGE, flags=re.S), re.M)]


def test_every_public_name_has_one_entry():
    assert {*ops_page.public()} <= {*HEADINGS} and len({*HEADINGS}) == len(HEADINGS)


def test_ops_are_in_the_order_of_a_step():
    step = ["prepare_block", "add_rms_norm", "linear", "qk_norm_rope", "block_attention", "silu_and_mul",
            "lm_head_argmax", "sample_draft", "verify_greedy", "write_context_kv", "StepGraph", "PagedKV", "build_info"]
    assert [title for title in HEADINGS if title in step] == step


def test_an_equation_stands_above_its_ops():
    for title, module, names in ops_page.sections():
        intro = PAGE.split(f"\n## {title}\n")[1].split("\n### ")[0]
        for block in re.findall(r"(?:^    .+\n)+", inspect.getdoc(module), re.M):
            assert inspect.cleandoc(block) in intro
        if ".ops." in module.__name__:
            assert "```text\n" in intro and names


@pytest.mark.parametrize("title, anchor", [("Linear layers", "#linear-layers"), ("Context K/V", "#context-kv"),
                                           ("StepGraph.replay", "#stepgraphreplay"), ("rms_norm", "#rms_norm")])
def test_anchors_are_those_of_the_host(title, anchor):
    assert title in HEADINGS and ops_page.anchor(title) == anchor


def test_links_lead_somewhere():
    anchors = {ops_page.anchor(title) for title in HEADINGS}
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", PAGE, flags=re.S))
    assert {f"#{name.lower()}" for name in ops_page.public()} <= {*links}
    for link in links:
        if link.startswith("#"):
            assert link in anchors, link
        elif not link.startswith("https://arxiv.org/abs/"):
            assert (ROOT / "docs" / link).exists(), link


def test_no_reference_is_left_behind():
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    assert not re.search(r"equations? above|module's text|head\.py(?<!lm_head\.py)", prose)
    assert not re.search(r"(?<!/)\b(reference|ops)/\w+\.py(?!\])", prose.replace("../dflash_kernels/", "/"))


def test_rows_of_tables_have_the_columns_of_their_head():
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M):
        counts = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(counts) == 1, table


def test_an_op_names_the_function_that_it_replaces():
    from dflash_engines import sglang, vllm
    row = r"^\| (?:vLLM|SGLang)[^|]*\| (\w+) \|[^|]*\| `(\w+)` \|"
    ops = dict(re.findall(row, (ROOT / "docs" / "engines.md").read_text(encoding="utf-8"), re.M))
    hooks = [*vllm.hooks(), *sglang.hooks()]
    assert hooks and {hook.name for hook in hooks} == {*ops}
    for hook in hooks:
        owner, _, function = hook.target.rpartition(":")[2].rpartition(".")
        wanted = {"__call__": owner, "get_attn_backend_cls": "the drafter's attention backend"}.get(function, function)
        replaced = [text for text in ops_page.public()[ops[hook.name]].__doc__.split("\n\n") if "Replaces " in text]
        assert replaced and re.search(rf"\b{wanted}\b", replaced[0]), hook.target


@pytest.mark.parametrize("name, text", [
    ("rms_norm", "rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-06, *, out: Tensor | None = None) -> Tensor"),
    ("linear", "linear(\n    x: Tensor,\n    weight: Tensor | PackedWeight,\n    bias: Tensor | None = None,\n    *,\n"
               "    out: Tensor | None = None,\n) -> Tensor"),
])
def test_signatures(name, text):
    assert ops_page.signature(name, ops_page.public()[name]) == text
