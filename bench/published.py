"""Published drafters: config.json of each, as published or as far as it is known, and a tiny drafter of its structure.

published.json has for each: name; known, "published" or "in part"; config; attention, a [number of layers, window or 0,
causal] for each run of layers; own, the tensors that it has beside its layers; needs, what must be done to its files
first; from_anchor, where the anchor's row drafts too; block_size, the caller's, of a config that has none;
target_layers and embedding_scale of its target, where config and 1 are not that.
"""

import copy
import json
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from bench import ROOT
from dflash_decode.model.config import read_draft_config, with_block_size
from dflash_decode.model.drafter import Drafter, tensor_shapes
from dflash_kernels import pack_weight

FILE = ROOT / "bench" / "published.json"
VOCAB, DRAFT_VOCAB, PREFIX, HIDDEN, MASK, WINDOW = 97, 40, 88, 64, 7, 6
_SIZES = {"hidden_size": HIDDEN, "target_hidden_size": HIDDEN, "intermediate_size": 96, "head_dim": 16,
          "v_head_dim": 16, "vocab_size": VOCAB, "mask_token_id": MASK, "sliding_window": WINDOW,
          "swa_window_size": WINDOW, "selector_rank": 8, "markov_rank": 8, "dspark_markov_rank": 8}
_MUSE = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}


@dataclass(frozen=True)
class Tiny:
    """A drafter with the entry's structure: config.json, tensors by the names of its format, and a target for it."""

    config: dict
    tensors: dict[str, torch.Tensor]
    target: SimpleNamespace

    def load(self) -> Drafter:
        return Drafter(self.config, self.tensors, self.target)


def entries() -> list[dict]:
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return [entry | {"config": with_block_size(entry["config"], entry.get("block_size"))} for entry in found]


def tiny(entry: dict, dtype: torch.dtype = torch.float32) -> Tiny:
    """Keeps the layers, their kinds, the ratio of heads, the block and the target's layers; makes all sizes small."""
    own, config = set(entry.get("own", ())), copy.deepcopy(entry["config"])
    for place in (config, config.get("dflash_config") or {}, config.get("transformer_layer_config") or {}):
        place.update({name: size for name, size in _SIZES.items() if place.get(name)})
        if heads := place.get("num_attention_heads"):
            ratio = heads // place.get("num_key_value_heads", heads)
            kv = 1 if ratio > 1 else 2
            place.update(num_attention_heads=kv * ratio, num_key_value_heads=kv)
    if config.get("draft_vocab_size"):
        config["draft_vocab_size"] = DRAFT_VOCAB if "d2t" in own else PREFIX
    read, generator = read_draft_config(config), torch.Generator().manual_seed(1)

    def random(*shape):
        x = torch.randn(shape, generator=generator)
        return (1 + 0.3 * x if len(shape) == 1 else x * 0.7 / shape[1] ** 0.5).to(dtype)

    tensors = {name: random(*shape) for name, shape in tensor_shapes(read).items()}
    extra = {"embed_tokens": (read.vocab_size, HIDDEN), "lm_head": (read.draft_vocab_size, HIDDEN)}
    tensors |= {f"{name}.weight": random(*shape) for name, shape in extra.items() if name in own}
    if "d2t" in own:
        kept = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
        tensors |= {"d2t": kept - torch.arange(DRAFT_VOCAB), "verifier_norm.weight": random(HIDDEN)}
    if "mask_embedding" in own:
        tensors["mask_embedding"] = random(HIDDEN)
    if config.get("model_type") == "muse_glimmer_assistant":
        tensors = {next((theirs + name.removeprefix(ours) for ours, theirs in _MUSE.items() if name.startswith(ours)),
                        name): t for name, t in tensors.items()}
    layers = entry.get("target_layers", entry["config"].get("num_target_layers"))
    embedding, head = (torch.randn((VOCAB, HIDDEN), generator=generator).to(dtype) for _ in range(2))
    target = SimpleNamespace(
        dtype=dtype, device=torch.device("cpu"), num_layers=layers, hidden_size=HIDDEN, vocab_size=VOCAB,
        max_context=512, embedding=embedding, embedding_scale=entry.get("embedding_scale", 1.0), head=pack_weight(head),
        head_bias=None)
    return Tiny(config, tensors, target)


def refusal(entry: dict) -> str | None:
    """Why the drafter does not load, in the error's words; None if it loads."""
    try:
        read_draft_config(entry["config"])
        tiny(entry).load()
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None
