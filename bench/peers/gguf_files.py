"""What the writers of GGUF files share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf


@contextmanager
def writing(file: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """A writer whose fields and tensors become the file when the block ends, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, architecture)
    yield writer
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def copy_field(writer: gguf.GGUFWriter, name: str, field: gguf.ReaderField) -> None:
    part = field.types[1] if len(field.types) > 1 else None
    writer.add_key_value(name, field.contents(), field.types[0], sub_type=part)
