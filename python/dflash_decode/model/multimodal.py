"""The text model within a multimodal checkpoint (Mistral 3, Ministral 3), for our own layers; images are not read."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint import Checkpoint
from .families import FAMILIES

_WRAPPER = "mistral3"
# As published, and as transformers has them.
_TEXT = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def kind_of_text(config: Mapping) -> Any:
    """The model_type of the model that reads and writes text."""
    kind, inner = config.get("model_type"), config.get("text_config")
    within = inner.get("model_type") if isinstance(inner, Mapping) else None
    return within if kind == _WRAPPER and isinstance(within, str) and within in FAMILIES else kind


def text_part(found: Checkpoint) -> Checkpoint:
    """The checkpoint without what is for images; unchanged where it is of text alone. An LM head that is there is used.
    """
    config = found.config
    if kind_of_text(config) == config.get("model_type"):
        return found
    tensors = _Text(found.tensors)
    tied = not any(name.startswith("lm_head.") for name in tensors)
    inner = {**config["text_config"], "quantization_config": config.get("quantization_config"),
             "tie_word_embeddings": tied}
    return Checkpoint(inner, tensors, found.source)


class _Text(Mapping):
    """Tensors by their names in a model of text alone."""

    def __init__(self, tensors: Mapping[str, Any]):
        self._tensors, self._names = tensors, {}
        for name in tensors:
            if not name.startswith(_IMAGES):
                prefix = next((prefix for prefix in _TEXT if name.startswith(prefix)), "")
                self._names[_TEXT.get(prefix, "") + name.removeprefix(prefix)] = name

    def __getitem__(self, name: str) -> Any:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
