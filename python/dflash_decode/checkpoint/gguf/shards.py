"""Models in several GGUF files, NAME-00001-of-00003.gguf and so on, as llama.cpp splits them."""

import re
from pathlib import Path

from ..errors import CheckpointError, regular

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def first_of(path: Path) -> Path:
    """The first file of the model that `path` is a part of: `path` itself where its name is no part's."""
    match = _NAME.fullmatch(path.name)
    return path if match is None else path.with_name(_part(match[1], 1, int(match[3])))


def files_of(path: Path) -> list[Path]:
    """The files of a model, by any of their names, in order. Raises CheckpointError for one that is missing."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [path]
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise CheckpointError(f"{path}: the number of a part must be between 1 and {count}; got {number}")
    files = []
    for i in range(1, count + 1):
        file = path.with_name(_part(match[1], i, count))
        try:
            regular(file)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (part {i} of {count})") from None
        files.append(file)
    return files


def _part(name: str, number: int, count: int) -> str:
    return f"{name}-{number:05d}-of-{count:05d}.gguf"


class Parts:
    """The readers of a model's files as one: the fields of the first, and the tensors of all."""

    def __init__(self, files: list[Path], readers: list):
        names: dict[str, Path] = {}
        for i, (file, reader) in enumerate(zip(files, readers, strict=True)):
            for key, want in (("split.no", i), ("split.count", len(files))):
                found = reader.fields.get(key)
                if (value := None if found is None else found.contents()) != want:
                    raise CheckpointError(f"{file}: {key} must be {want}, as its name says; got {value}")
            for tensor in reader.tensors:
                if tensor.name in names:
                    raise CheckpointError(f"{file}: {tensor.name} must be in one part; got it in "
                                          f"{names[tensor.name].name} too")
                names[tensor.name] = file
        self.fields = readers[0].fields
        self.tensors = [tensor for reader in readers for tensor in reader.tensors]
        total = self.fields.get("split.tensors.count")
        if total is not None and total.contents() != len(self.tensors):
            raise CheckpointError(f"{files[0]}: the parts must have {total.contents()} tensors, as split.tensors.count "
                                  f"says; got {len(self.tensors)}")
