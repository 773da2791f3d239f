"""What applies where a request names nothing: the settings in generation_config.json, or greedy decoding."""

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.errors import CheckpointError
from ..checkpoint.fields import Fields
from ..checkpoint.tokenizer_config import read_optional

MAX_TOKENS = 256


@dataclass(frozen=True)
class Defaults:
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_defaults(model: Path) -> Defaults:
    """What generation_config.json in a model's directory says; a GGUF file has none.

    As in transformers, temperature is that of sampling, which happens only with "do_sample": true; without it decoding
    is greedy. Raises CheckpointError for values out of range.
    """
    file = model / "generation_config.json"
    found = read_optional(file) if model.is_dir() else {}
    f, off = Fields(str(file), found, error=CheckpointError), Defaults()
    temperature = f.number("temperature", 1.0, least=0.0)
    return Defaults(
        f.whole("max_new_tokens", off.max_tokens), temperature if f.flag("do_sample", False) else off.temperature,
        f.whole("top_k", off.top_k, least=0), f.number("top_p", off.top_p, least=0.0, most=1.0),
        f.number("min_p", off.min_p, least=0.0, most=1.0),
        f.number("repetition_penalty", off.repetition_penalty, above=0.0))
