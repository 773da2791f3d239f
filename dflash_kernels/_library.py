"""The operator namespace: schemas, fakes, and which backend answers.

Each op is defined once, in "out" form (it returns nothing and writes into tensors that the caller gives), so that
nothing is allocated behind a CUDA graph's back. The float32 reference is registered for every device; the C++ library
registers CPU kernels over it when it is loaded, and CUDA's are those that _gpu.py chooses. A device that ends up on the
reference warns once and says why. A C++ library that is there but does not load (a bad DFLASH_ISA, another torch's ABI)
is an error, not a slow fallback; what a GPU alone needs, Triton and the CUDA C++ library, stops nobody from importing.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from . import _gpu
from ._namespace import NATIVE, OPS

_lib = torch.library.Library(OPS, "DEF")
_warned: set[str] = set()


def _load(module: str, language: str):
    if importlib.util.find_spec(module, __package__) is None:
        return None
    try:
        return importlib.import_module(module, __package__)
    except Exception as error:
        why = f"the {language} library is built but does not load: {error}"
        if TorchVersion(torch.__version__) < "2.10":
            why += f". It is for torch 2.10 or newer; this is torch {torch.__version__}"
        elif str(error).startswith("libtorch"):  # Debian's have numbers
            why += f". It is linked to PyPI's torch; torch {torch.__version__} has its libraries under other names"
        raise ImportError(f"dflash_kernels: {why}") from error


def _load_cuda():
    """The CUDA C++ library, or None, and why it does not load. Triton answers for it then."""
    try:
        return _load("._cuda", "CUDA C++"), None
    except ImportError as error:
        warnings.warn(f"{error}. Triton answers in its place.", stacklevel=2)
        return None, str(error.__cause__)


native = _load(NATIVE, "C++")
cuda, cuda_error = _load_cuda() if torch.version.cuda else (None, None)
NAMES: list[str] = []
REFERENCES: dict[str, Callable] = {}
FALLBACKS: dict[str, Callable] = {}  # the references, which warn, and refuse to be captured
if torch.version.cuda:
    _gpu.install(_lib, cuda, FALLBACKS)


def _nothing(*_args, **_kwargs) -> None:
    return None


def _warn_reference(device: str) -> None:
    if device in _warned:
        return
    _warned.add(device)
    if device == "cpu":
        what = (f"{Path(__file__).parent} has no C++ kernels (dflash_kernels._C). In a clone Python finds the sources "
                "before the installed package: run it elsewhere. Otherwise install g++ and reinstall dflash-kernels")
    else:
        what = (_gpu.problem() if device == "cuda" else None) or f"there are no kernels for device {device!r}"
    warnings.warn(f"dflash_kernels runs its float32 reference, which is correct and slow: {what}.", stacklevel=4)


def capturing() -> bool:
    """Whether launches are being noted for a replay, in which a reference called now would be missing."""
    return native is not None and native.recording() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@contextmanager
def _alone(device: str) -> Iterator[None]:
    with torch.no_grad():
        if not torch.amp.is_autocast_available(device):
            yield
        else:
            with torch.autocast(device, enabled=False):
                yield


def define(schema: str, reference: Callable) -> Callable:
    """Defines op `schema` with `reference` as its answer where nothing faster is built; returns the callable op.

    schema: in torch's schema language, without namespace, returning (). The reference has the same arguments, in order.
    """
    name = schema.split("(", 1)[0]
    _lib.define(schema)

    def fallback(*args, **kwargs):
        if capturing():
            raise RuntimeError(f"StepGraph: {name} has no kernel here to capture; only its reference would run")
        first = next(a for a in args if isinstance(a, torch.Tensor))
        _warn_reference(first.device.type)
        with _alone(first.device.type):  # as kernels are, which neither autograd nor autocast sees into
            return reference(*args, **kwargs)

    _lib.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{OPS}::{name}", _nothing, lib=_lib)
    _gpu.define(schema, cuda)
    NAMES.append(name)
    FALLBACKS[name] = fallback
    REFERENCES[name] = reference
    return getattr(getattr(torch.ops, OPS), name).default
