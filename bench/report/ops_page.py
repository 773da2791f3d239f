"""docs/ops.md, made from docstrings: the ops in the order of a step, each below its module's equation."""

import inspect
import re
import sys
import textwrap
from types import ModuleType

import dflash_kernels
from bench.report import docstrings
from dflash_kernels import info, limits, ops, paged_kv, step_graph, storage, testing, types

# Title, module, and the names that come first. A module's other public names follow; other modules come last.
SECTIONS = (
    ("Prepare the block", ops.block, ("prepare_block", "embed_tokens")),
    ("Norms", ops.norm, ("add_rms_norm", "rms_norm")),
    ("Convolution", ops.conv, ()),
    ("Linear layers", ops.linear, ("linear", "pack_weight", "quantize_weight")),
    ("4-bit checkpoints", ops.int4, ()),
    ("Norm and rotation of q and k", ops.rope, ()),
    ("Attention", ops.attention, ()),
    ("Activation", ops.activation, ()),
    ("Router of experts", ops.router, ()),
    ("Experts", ops.experts, ("expert_mlp", "pack_experts")),
    ("LM head", ops.lm_head, ("lm_head_argmax", "lm_head_topk", "combine_argmax", "combine_topk")),
    ("Selector", ops.selector, ()),
    ("Sampling", ops.sample, ("sample_draft", "verify_sample")),
    ("Greedy verification", ops.verify, ()),
    ("Context K/V", ops.context, ()),
    ("Recorded steps", step_graph, ()),
    ("Limits", limits, ("supports", "Support")),
    ("Caches", paged_kv, ()),
    ("Packed weights", storage, ()),
    ("Records of a step", types, ("PreparedBlock", "SamplingTensors", "LogitAdjustments", "Proposal", "Verified")),
    ("Installation", info, ()),
    ("Testing", testing, ("assert_within_budget", "same_bits", "doubles")),
)
NOTATION = {"B": "requests", "Q": "tokens of a block", "T": "tokens, or rows", "V": "vocabulary size",
            "H": "hidden size", "I": "outputs of the activation", "Hq, Hkv": "query heads; key and value heads",
            "D": "head dimension", "P": "tokens per page", "L": "draft layers", "S": "vocabulary shards",
            "t, G": "taps and groups of a convolution",
            "E, X": "experts of a layer; those that some row chose",
            "N": "outputs of a linear layer", "K": "inputs of a linear layer; candidates per draft",
            "R": "rotary dimension; rows of a shard; rank of a codebook",
            "C": "context tokens that some query sees, of all requests together",
            "e, c, w": "bytes of an element: of the op's rows, logits or table; of the cache; of the weight"}
WIDTH = 100  # of a signature on one line
SHORT = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])")  # the modules of a type's name


def public() -> dict[str, object]:
    """Every public function and class by name, those of dflash_kernels.testing included."""
    found = {name: getattr(dflash_kernels, name) for name in dflash_kernels.__all__}
    found |= {name: getattr(testing, name) for name in testing.__all__}
    return {name: item for name, item in found.items() if callable(item)}


def sections() -> list[tuple[str, ModuleType, list[str]]]:
    """Title, module and names of each section."""
    home = {name: sys.modules[item.__module__] for name, item in public().items()}
    home = {name: testing if module.__name__.startswith(testing.__name__) else module for name, module in home.items()}
    found = [(title, module, [*first, *(n for n in home if home[n] is module and n not in first)])
             for title, module, first in SECTIONS]
    placed = {module for _, module, _ in found}
    others = dict.fromkeys(module for module in home.values() if module not in placed)
    return found + [(module.__name__.rpartition(".")[2].strip("_").capitalize(), module,
                     [name for name in home if home[name] is module]) for module in others]


def anchor(title: str) -> str:
    return "#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def linked(text: str, here: str = "") -> str:
    """Prose with links for papers, files and public names, other than the name that it belongs to."""
    titles = {module.__name__.rpartition(".")[2]: title for title, module, _ in sections()}
    names = [name for name in public() if name != here]
    classes = [name for name in names if name[0].isupper()]
    text = re.sub(r"\barXiv\s+(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"\breference/\w+\.py", r"[\g<0>](../dflash_kernels/\g<0>)", text)
    text = re.sub(r"\bcsrc/[\w/]+\.\w+", r"[\g<0>](../\g<0>)", text)
    text = re.sub(r"\bops/(\w+)\.py", lambda m: f"[{titles[m[1]]}]({anchor(titles[m[1]])})", text)
    return re.sub(rf"`({'|'.join(names)})`|\b({'|'.join(classes)})\b",
                  lambda m: f"[`{m[1] or m[2]}`]({anchor(m[1] or m[2])})", text)


def prose(text: str, here: str = "") -> str:
    """Paragraphs and lists with links, indented blocks as text, and `>>>` blocks as Python."""
    parts = []
    for block in re.split(r"\n\n+", text):
        language = "text" if block.startswith("    ") else "python" if block.startswith(">>>") else ""
        parts.append(f"```{language}\n{textwrap.dedent(block)}\n```" if language else linked(block, here))
    return "\n\n".join(parts)


def signature(name: str, item: object) -> str:
    if isinstance(item, property):
        return name
    found = inspect.signature(getattr(item, "__func__", item))
    returns = "" if found.return_annotation in (inspect.Signature.empty, None) or inspect.isclass(item) else \
        f" -> {inspect.formatannotation(found.return_annotation)}"
    rows, star = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            rows.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        rows.append(str(parameter))
    rows, returns = [SHORT.sub("", row) for row in rows], SHORT.sub("", returns)
    text = f"{name}({', '.join(rows)}){returns}"
    return text if len(text) <= WIDTH else f"{name}(\n" + "".join(f"    {row},\n" for row in rows) + f"){returns}"


def table(title: str, fields: list[docstrings.Field], here: str) -> list[str]:
    rows = [[", ".join(f"`{name}`" for name in f.names), linked(f.kind, here), linked(f.text, here)] for f in fields]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return [f"| {title} | | |", "|---|---|---|", *lines, ""]


def entry(name: str, item: object, level: int = 3) -> list[str]:
    """One function, class or method as Markdown."""
    doc, here = docstrings.parse(inspect.getdoc(item)), name.rpartition(".")[2]
    parts = ["#" * level + f" {name}", "", "```python", signature(name, item), "```", "", linked(doc.summary, here), ""]
    if doc.more:
        parts += [prose(doc.more, here), ""]
    for title in ("Parameters", "Attributes", "Returns"):
        if title in doc.fields:
            parts += table(title.lower(), doc.fields[title], here)
    if "Raises" in doc.fields:
        raised = [(", ".join(f"`{name}`" for name in f.names), linked(f.text, here)) for f in doc.fields["Raises"]]
        parts += ["Raises", *[f"- {names}: {text}" for names, text in raised], ""]
    for text in doc.texts.values():
        parts += [prose(text, here), ""]
    if inspect.isclass(item):
        for member, method in docstrings.members(item).items():
            parts += entry(f"{name}.{member}", method, level + 1)
    return parts


def ops_page() -> str:
    parts = ["# Ops", "", "`make docs` writes this page from the docstrings. The order is that of a decoding step.", "",
             "| section | ops |", "|---|---|"]
    for title, _, names in sections():
        parts.append(f"| [{title}]({anchor(title)}) | " + ", ".join(f"[`{n}`]({anchor(n)})" for n in names) + " |")
    rules = inspect.getdoc(ops).partition("\n\n")[2]
    parts += ["", prose(rules), "", "| size | |", "|---|---|"]
    parts += [f"| {letters} | {meaning} |" for letters, meaning in NOTATION.items()] + [""]
    for title, module, names in sections():
        parts += [f"## {title}", "", prose(inspect.getdoc(module)), ""]
        for name in names:
            parts += entry(name, public()[name])
    return "\n".join(parts).rstrip("\n") + "\n"
