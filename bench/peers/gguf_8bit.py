"""Writes a GGUF file's weights in 8 bits (q8_0), for a comparison of decoders on weights of that size."""

from pathlib import Path

import gguf
import numpy as np

from bench.peers.gguf_files import copy_field, writing

EIGHT = gguf.GGMLQuantizationType.Q8_0


def write(source: str, file: Path) -> Path:
    """Writes the file with every quantised weight rounded to q8_0, and the rest as it is, atomically."""
    found = gguf.GGUFReader(source)
    with writing(file, found.fields["general.architecture"].contents()) as writer:
        for name, field in found.fields.items():
            if name == "general.file_type":
                writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
            elif not name.startswith("GGUF.") and name != "general.architecture":  # the writer's own
                copy_field(writer, name, field)
        for tensor in found.tensors:
            kind = tensor.tensor_type
            if kind in (gguf.GGMLQuantizationType.F32, EIGHT):
                data = tensor.data
            else:
                exact = np.ascontiguousarray(gguf.dequantize(tensor.data, kind))
                data, kind = gguf.quants.quantize(exact, EIGHT), EIGHT
            writer.add_tensor(tensor.name, data, raw_dtype=None if kind == gguf.GGMLQuantizationType.F32 else kind)
    return file
