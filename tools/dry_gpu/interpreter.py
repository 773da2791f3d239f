"""Makes Triton's interpreter work with a NumPy newer than it supports, and faster, for the rest of the process."""

import dataclasses
import functools
from types import SimpleNamespace


def prepare() -> None:
    """Changes neither results nor errors, but that Triton 3.6 accepts NumPy 2.4."""
    import triton
    from triton.runtime import interpreter

    if triton.__version__.startswith("3.6."):
        _accept_newer_numpy(interpreter)
    # Patched at every call of a kernel or of a function in it, and back: half of the interpreter's time.
    interpreter._patch_lang = functools.cache(functools.partial(_patch_for_good, interpreter._patch_lang))
    # Makes a table of all types at every operation.
    interpreter._get_np_dtype = functools.partial(_known, {}, interpreter._get_np_dtype)
    # Every 32-bit sum is repeated in 64 bits for an assertion that is then left out, unless this is set.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _accept_newer_numpy(interpreter) -> None:
    """Triton 3.6 makes a loop's bound, an array of one element, an integer in a way that NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_index_too


def _patch_for_good(patch, kernel):
    patch(kernel)
    return SimpleNamespace(restore=lambda: None)


def _known(types, of, dtype):
    name = dtype.scalar.name  # a block's type cannot be hashed
    if name not in types:
        types[name] = of(dtype)
    return types[name]
