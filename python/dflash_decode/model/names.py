"""The names that drafters' checkpoints give to the same tensors."""

from collections.abc import Mapping

import torch

_PREFIXES = {"model.": "", "encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm.", "midlayer.": "layers.0."}
_CODEBOOKS = ("predecessor_codebook.weight", "successor_codebook.weight")
# The rotary table's frequencies, copies of the target's tensors that training needs, and DSpark's confidence head.
_UNUSED = ("rotary_emb.inv_freq", "verifier_lm_head.weight", "verifier_norm.weight", "confidence_head.proj.weight",
           "confidence_head.proj.bias")


def renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by the names of z-lab's checkpoints, without those that a drafter does not use. Raises ValueError for
    two of one name."""
    found: dict[str, torch.Tensor] = {}
    for name, t in tensors.items():
        if name.endswith(_UNUSED):
            continue
        new = name
        for prefix, other in _PREFIXES.items():
            new = other + new.removeprefix(prefix) if new.startswith(prefix) else new
        if new.endswith(_CODEBOOKS):
            new = new.removesuffix(".weight")
        if new in found:
            raise ValueError(f"draft checkpoint: tensor {new} must be there once; got it again as {name}")
        found[new] = t
    return found
