"""Writes a model that we read as the Hugging Face directory that transformers and vLLM need."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.checkpoint.tokenizer import load_tokenizer


def export(model: str, folder: Path) -> Path:
    """Writes config.json, model.safetensors in bfloat16, tokenizer.json and tokenizer_config.json with the chat
    template, atomically."""
    found, tokenizer = load_checkpoint(model, torch.bfloat16), load_tokenizer(model)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template,
                **tokenizer.special_tokens}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        save_file({name: t.contiguous() for name, t in found.tensors.items()}, temporary / "model.safetensors",
                  metadata={"format": "pt"})  # transformers refuses a file that does not say so
        tokenizer.backend.save(str(temporary / "tokenizer.json"))
        (temporary / "config.json").write_text(json.dumps(found.config, indent=1))
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
