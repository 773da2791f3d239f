"""Which kernels a function launches on a GPU, and with how many programs, counted with no GPU: kernels are noted
instead of run, and tensors may be on "meta"."""

from contextlib import ExitStack, contextmanager
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from dflash_kernels import _triton


class OnLaunchers(TorchDispatchMode):
    """Our ops by the launchers that CUDA has."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dflash":
            func = _triton.load(_triton.LAUNCHERS[func._schema.name.split("::")[1]])
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(multiprocessors: int = 132, generation: int = 9):
    """A list of (kernel, grid), which grows as the block runs. The chip is an H100 if not told otherwise."""
    from triton.runtime.jit import KernelInterface

    from dflash_kernels._triton import attention, linear

    noted = []

    def get(kernel, grid):
        return lambda *args, **options: noted.append((kernel.__name__, grid))

    with ExitStack() as stack:
        for owner, name, stand_in in ((KernelInterface, "__getitem__", get),
                                      (linear, "multiprocessors", lambda device: multiprocessors),
                                      (attention, "multiprocessors", lambda device: multiprocessors),
                                      (attention, "generation", lambda device: generation)):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(OnLaunchers())
        yield noted
