"""Makes Triton's interpreter work with a NumPy newer than it supports, and faster, for the rest of the process."""

import dataclasses
import functools
from types import SimpleNamespace


def prepare() -> None:
    """Changes neither results nor errors, but that Triton 3.6 accepts NumPy 2.4, and that the bits of a product depend
    on its row and column alone."""
    import numpy  # here, as a machine with a GPU may have none
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
    _remember_shapes(triton.language.core)
    _sum_alike(numpy, triton.language.float64, interpreter)


def _sum_alike(np, float64, interpreter) -> None:
    """A BLAS sums a product in an order that depends on how many rows there are, and on the machine. In float64 the
    order changes a sum by less than float32 keeps."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, d, *options):
        if d.data.dtype != np.float32:
            return create_dot(self, a, b, d, *options)
        nothing = SimpleNamespace(data=np.zeros(d.data.shape), dtype=float64)
        sums = create_dot(self, a, b, nothing, *options).data.astype(np.float32)
        return interpreter.TensorHandle(sums + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot


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


def _remember_shapes(core) -> None:
    """Every value makes its shape anew, checks it and writes it out as the name of its type: a third of the
    interpreter's time. Few shapes occur, and hardly any name is read."""
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    blocks, tensors = {}, {}  # (shape, numel) by the sizes

    def block(self, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if sizes not in blocks:
            make_block(self, element_ty, shape)
            blocks[sizes] = self.shape, self.numel
        self.element_ty, (self.shape, self.numel) = element_ty, blocks[sizes]

    def tensor(self, handle, type):
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in tensors:
            make_tensor(self, handle, type)
            tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, tensors[sizes]

    core.block_type.__init__, core.tensor.__init__ = block, tensor
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
