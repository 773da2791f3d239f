"""Writes a GGUF file's weights in 8 bits (q8_0), for a comparison of decoders on weights of that size."""

import os
from pathlib import Path

import gguf
import numpy as np

EIGHT = gguf.GGMLQuantizationType.Q8_0


def write(source: str, file: Path) -> Path:
    """Writes the file with every quantised weight rounded to q8_0, and the rest as it is, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found, temporary = gguf.GGUFReader(source), file.with_name(f".{file.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, found.fields["general.architecture"].contents())
    for name, field in found.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        part = field.types[1] if len(field.types) > 1 else None
        value = int(gguf.LlamaFileType.MOSTLY_Q8_0) if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], sub_type=part)
    for tensor in found.tensors:
        kind = tensor.tensor_type
        if kind in (gguf.GGMLQuantizationType.F32, EIGHT):
            data = tensor.data
        else:
            data, kind = gguf.quants.quantize(np.ascontiguousarray(gguf.dequantize(tensor.data, kind)), EIGHT), EIGHT
        writer.add_tensor(tensor.name, data, raw_dtype=None if kind == gguf.GGMLQuantizationType.F32 else kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file
