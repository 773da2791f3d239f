"""Every published drafter loads and drafts as a plain torch forward of its config, or is refused in one sentence.

The forward reads config.json by other code than the package. docs/drafters.md is the table of this.
"""

import json
import re

import pytest
import torch

pytest.importorskip("transformers")

from bench.published import HIDDEN, MASK, VOCAB, WINDOW, entries, refusal, tiny  # noqa: E402
from dflash_decode.model.config import read_draft_config  # noqa: E402
from dflash_kernels.testing import assert_within_budget  # noqa: E402
from tests.support.drafters import Served, dense, dflash_model, markov, selected  # noqa: E402
from tests.support.plain_config import plain_config  # noqa: E402

ENTRIES = entries()
LOADED = [entry for entry in ENTRIES if refusal(entry) is None]
CONTEXT, ANCHOR = 11, 3
_NAMES = {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}


def named(entry):
    return entry["name"]


def small(entry):
    return [[count, WINDOW if window else 0, causal] for count, window, causal in entry["attention"]]


def plain_rows(c, t, made, dtype):
    """The block's embedded tokens (Q, H)."""
    own = t.get("embed_tokens.weight")
    table = made.target.embedding if own is None else own
    scale = c.input_scale or (1.0 if own is not None or c.candidates else made.target.embedding_scale)
    rows = table[torch.tensor([ANCHOR] + [c.mask] * (c.block - 1))].to(dtype) * scale
    if "mask_embedding" in t:
        rows[1:] = t["mask_embedding"]
    return rows


def plain_ids(c, t, made, hidden, from_anchor=False):
    """The drafted tokens, and whether each is beyond doubt."""
    hidden = hidden if from_anchor else hidden[1:]
    head = t.get("lm_head.weight", made.target.head.rows(torch.arange(VOCAB)))
    logits = (hidden @ head.to(hidden.dtype).T)[:, :min(c.vocab, VOCAB)] * c.factor
    logits = torch.tanh(logits / c.cap) * c.cap if c.cap else logits
    if c.candidates:
        return selected(t, hidden, logits, ANCHOR, c.candidates), torch.ones(len(logits), dtype=torch.bool)
    if c.markov:
        return markov(t, logits, ANCHOR, 32), torch.ones(len(logits), dtype=torch.bool)
    top = logits.topk(2, -1)
    ids = top.indices[:, 0]
    return ids + t["d2t"][ids] if "d2t" in t else ids, top.values[:, 0] - top.values[:, 1] > 1e-3


@pytest.mark.parametrize("entry", LOADED, ids=named)
@torch.no_grad()
def test_drafts_equal_a_plain_forward(entry):
    made = tiny(entry)
    drafter = made.load()
    c = plain_config(made.config, small(entry))
    from_anchor = entry.get("from_anchor", False)
    width = c.block + from_anchor
    assert list(drafter.target_layer_ids) == c.target_layer_ids and drafter.block_size == width and c.mask == MASK
    served = Served(drafter, [CONTEXT]).commit_all()
    got, ids = served.draft([ANCHOR], width=width)
    t = {next((new + k.removeprefix(old) for old, new in _NAMES.items() if k.startswith(old)), k): v
         for k, v in made.tensors.items()}
    features = served.features[0]
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in t.items()}
    want = dense(c, doubles, features.double(), plain_rows(c, doubles, made, torch.float64))
    assert_within_budget(got[0], want, dense(c, t, features, plain_rows(c, t, made, torch.float32)), name=named(entry))
    tokens, sure = plain_ids(c, doubles, made, want, from_anchor)
    assert torch.equal(ids[0, 1:][sure], tokens[sure]) and sure.sum() > len(sure) // 2


BY_AUTHORS = [entry for entry in LOADED if {"num_target_layers", "dflash_config"} <= entry["config"].keys() and not
              {"use_swa", "attention_value_scale", "selector_rank"} & entry["config"]["dflash_config"].keys()]


@pytest.mark.parametrize("entry", BY_AUTHORS, ids=named)
@torch.no_grad()
def test_the_plain_forward_is_that_of_the_authors(entry):
    """dflash's own model, which reads config.json by transformers' class."""
    made = tiny(entry)
    t = {k: v.double() for k, v in made.tensors.items()}
    c = plain_config(made.config, small(entry))
    kept = {k: v for k, v in t.items() if k.startswith(("layers.", "fc.", "norm.", "hidden_norm."))}
    features = torch.randn(CONTEXT, len(c.target_layer_ids) * HIDDEN).double()
    rows = plain_rows(c, t, made, torch.float64)
    want = dflash_model(made.config, kept, torch.float64)(
        position_ids=torch.arange(CONTEXT + len(rows))[None], noise_embedding=rows[None], target_hidden=features[None])
    torch.testing.assert_close(dense(c, t, features, rows), want[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_plain_forward_of_dflash2_is_that_of_the_authors():
    model = pytest.importorskip("dflash.model")
    from transformers import Qwen3Config

    entry = next(entry for entry in ENTRIES if entry["name"] == "incoai/Qwen3.8-27B-DFlash2")
    made = tiny(entry)
    t, c = {k: v.double() for k, v in made.tensors.items()}, plain_config(made.config, small(entry))
    authors = model.DFlash2DraftModel(Qwen3Config(**made.config)).double().eval()
    authors.load_state_dict({f"{k}.weight" if k.endswith("codebook") else k: v for k, v in t.items()})
    authors.config._attn_implementation = "sdpa"
    features = torch.randn(CONTEXT, len(c.target_layer_ids) * HIDDEN).double()
    rows = plain_rows(c, t, made, torch.float64)
    want = authors(position_ids=torch.arange(CONTEXT + len(rows))[None], noise_embedding=rows[None],
                   target_hidden=features[None])
    got = dense(c, t, features, rows)
    torch.testing.assert_close(got, want[0], rtol=1e-5, atol=1e-5)
    head = made.target.head.rows(torch.arange(VOCAB)).double()
    path, _, _ = authors.propose(want[:, 1:], torch.tensor([ANCHOR]), lambda x: x @ head.T, 0.0)
    assert plain_ids(c, t, made, got)[0].tolist() == path[0].tolist()


@pytest.mark.parametrize("entry", ENTRIES, ids=named)
def test_a_drafter_loads_or_one_sentence_names_the_field(entry):
    why = refusal(entry)
    if why is None:
        counts = [count for count, _, _ in entry["attention"]]
        assert sum(counts) == read_draft_config(entry["config"]).num_layers
        return
    kinds = ("DSpark", "Domino", "LiLiCorr", "XPress", "Laguna", "MLA", "use_sliding_window must not be false")
    assert any(kind in why for kind in kinds), why  # the rest loads
    field = re.fullmatch(r"draft config: ([\w.]+)(?: |,|=).*", why)
    assert field and "\n" not in why and len(why) < 300, why
    assert f'"{field[1].rsplit(".", 1)[-1]}"' in json.dumps(entry["config"])
