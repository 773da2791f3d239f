"""Where this copy of the library registers its ops, and the module of its C++ library."""

from ._ops import ops

OPS = ops.name
NATIVE = f".{OPS}"
