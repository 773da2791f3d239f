"""Finds models in the local cache of huggingface_hub by their ids ("Qwen/Qwen3-8B"). Nothing is fetched here."""

import re
from pathlib import Path

from .errors import CheckpointError, CheckpointNotFound, brief
from .gguf.shards import first_of

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_id(name: str) -> bool:
    """Whether the text has the form of a hub id: one owner, one name."""
    return len(name) <= 200 and _ID.fullmatch(name) is not None


def find_cached(name: str) -> Path | None:
    """The folder of the model with this id in the cache, or its GGUF file where that is all it has. None if the text is
    no id, or nothing of the model is there.

    Raises CheckpointNotFound where huggingface_hub is needed and missing, and CheckpointError for a model that is there
    in part, or in several GGUF files.
    """
    if not is_id(name):
        return None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointNotFound(f"{name!r} is no path; to look it up in the cache of models fetched from the Hugging "
                                 "Face Hub: pip install huggingface_hub") from None
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    except OSError as error:
        raise CheckpointError(f"{name}: the cache of huggingface_hub must be readable; got {brief(error)}") from None
    # A repository of GGUF files can have a config.json, parts in folders, and a file that reads images.
    files = sorted({first_of(file) for file in folder.rglob("*.gguf") if not file.name.startswith("mmproj")})
    if (folder / "config.json").exists() and (not files or any(folder.glob("*.safetensors*"))):
        return folder
    if len(files) == 1:
        return files[0]
    got = f"{len(files)} .gguf files: name one of them by its path, as {files[0]}" if files else \
        f"neither; to fetch all of it: {fetching(name)}"
    raise CheckpointError(f"{folder}: expected config.json or one .gguf file of {name}; got {got}")


def fetching(name: str) -> str:
    """The command that fetches the model with this id."""
    return f"hf download {name}"


def hint(name: str) -> str:
    """What an error about a name that was not found adds."""
    return f"; to fetch it from the Hugging Face Hub: {fetching(name)}" if is_id(name) else ""
