"""A stand-in for a GPU: runs programs written for CUDA on a CPU, with Triton kernels in the interpreter.

    python -m tools.dry_gpu.gpu SCRIPT [ARGUMENT ...]        or -m MODULE [ARGUMENT ...]

It finds Python errors before a GPU is rented: names, shapes and dtypes, launchers and their arguments, tensors of two
devices in one op, a host synchronisation during a capture, a graph that does not follow its inputs. It shows neither
time nor errors of the compiler or the GPU.

Tensors report cuda:0 and hold a CPU tensor each. Every op on them runs on the held tensors, and dflash ops through the
CUDA launchers. A captured graph records ops and kernel launches and repeats them on the same memory; unlike CUDA's, it
also runs them during the capture. Triton decides at its import whether it interprets, so this module sets
TRITON_INTERPRET and refuses to be imported after it. The interpreter computes bfloat16 wrongly: use float16.
"""

import contextlib
import functools
import itertools
import os
import runpy
import sys
import time
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dflash_kernels import _triton
from dflash_kernels._library import FALLBACKS, REFERENCES

from .interpreter import prepare

DEVICE = torch.device("cuda", 0)
NAME = "dry"
_aten = torch.ops.aten
_BETWEEN_DEVICES = {_aten.copy_.default, _aten.index.Tensor, _aten.index_put_.default}
_SYNCHRONISE = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "repeat_interleave",
                "_unique2"}
_launchers: dict[str, object] = {}
_originals: dict[tuple, object] = {}  # (owner, name): what it was, None for inherited
_capturing: "Graph | None" = None
_STREAM, _pools = SimpleNamespace(cuda_stream=0, synchronize=lambda: None), itertools.count(1)


class DryTensor(torch.Tensor):
    """A CUDA tensor as Python sees it; `held` is the CPU tensor. To torch's C++ it is on the CPU, because a torch
    without CUDA cannot index a tensor that says otherwise; so whatever asks C++ for the device is answered here."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device="cpu")
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return DEVICE.index

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"{NAME} {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _to(self, *args, copy=False, **kwargs):
    """Tensor.to, for tensors of both kinds."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    there, here = _is_cuda(device), isinstance(self, DryTensor)
    if device is None or there == here:
        return torch._C.TensorBase.to(self, dtype or self.dtype, copy=copy)
    _no_capture("a copy between devices")
    moved = torch._C.TensorBase.to(held(self), dtype or self.dtype, copy=True)
    return DryTensor(moved) if there else moved


def _from_data(make):
    """torch.tensor and torch.as_tensor, which copy to a device below the level of DryMode."""
    return lambda data, *, device=None, **options: _to(
        make(data, device="cpu", **options), torch.utils._device.CURRENT_DEVICE if device is None else device)


class DryMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # a launcher's own ops come here too
            return _run(func, args, kwargs or {})


def held(value):
    return value.held if isinstance(value, DryTensor) else value


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _no_capture(what) -> None:
    if _capturing is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def _run(func, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = {id(t.held): t for t in tensors if isinstance(t, DryTensor)}
    device = kwargs.get("device")
    if not ours and not _is_cuda(device):
        with _disable_current_modes():
            return func(*args, **kwargs)
    crosses = len(ours) and any(t.dim() and not isinstance(t, DryTensor) for t in tensors)
    if crosses and func not in _BETWEEN_DEVICES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu: {func}")
    name = func._schema.name.split("::")[1]
    masked = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
    if crosses or masked or name in _SYNCHRONISE:
        _no_capture(func)
    if func.namespace == "dflash":
        if name not in _launchers:
            _no_capture(f"{func}, which has no kernel")
        return (_launchers.get(name) or REFERENCES[name])(*args, **kwargs)
    if name == "_fused_sdp_choice":
        return 0  # the one that is written in other ops
    args, kwargs = tree_map(held, (args, kwargs))
    if device is not None:  # cuda, or what C++ takes a tensor's device for
        kwargs["device"] = "cpu"
    with _disable_current_modes():
        out = func(*args, **kwargs)
        if _capturing is not None:
            _capturing.note_op(func, args, kwargs, out)
    return tree_map(lambda t: ours.get(id(t), DryTensor(t)) if isinstance(t, torch.Tensor) else t, out)


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self._launches, self._pool = [], None

    def pool(self):
        return self._pool

    def note_op(self, func, args, kwargs, out):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if func._schema.is_mutable:
            self._launches.append(lambda: func(*args, **kwargs))
        elif not any(t.untyped_storage().data_ptr() in known for t in made) and "empty" not in func._schema.name:
            self.note_function(functools.partial(func, *args, **kwargs), out)

    def note_function(self, function, out):
        """function() gives new tensors: their values go where out's are."""
        made = tree_leaves(out)
        self._launches.append(lambda: [a.copy_(b) for a, b in zip(made, tree_leaves(function()), strict=True)
                                       if isinstance(a, torch.Tensor)])

    def note_launch(self, launch):
        self._launches.append(launch)

    def replay(self):
        with _no_gpu():
            for launch in self._launches:
                launch()


@contextlib.contextmanager
def _capture(graph, pool=None, **_options):
    global _capturing
    if _capturing is not None:
        raise RuntimeError("a graph is being captured already")
    _capturing, graph._pool = graph, pool
    try:
        yield
    finally:
        _capturing = None


class Event:
    """In the place of torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False):
        self._at = 0.0

    def record(self, _stream=None):
        self._at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return (end._at - self._at) * 1e3


def _put(owner, name: str, stand_in) -> None:
    _originals[owner, name] = vars(owner).get(name)
    setattr(owner, name, stand_in)


@contextlib.contextmanager
def _no_gpu():
    """torch as it was, for its compiler, which looks at all of it."""
    stand_ins = {(owner, name): vars(owner)[name] for owner, name in _originals}
    for (owner, name), original in _originals.items():
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    try:
        with _disable_current_modes():
            yield
    finally:
        for (owner, name), stand_in in stand_ins.items():
            setattr(owner, name, stand_in)


def _compile(compile, model=None, **options):
    """torch.compile as far as tracing: compiling would take a minute, and for another machine."""
    if model is None:
        return lambda f: _compile(compile, f, **options)
    with _no_gpu():
        from torch.nn.attention.flex_attention import BlockMask

        traced = compile(model, backend="eager", fullgraph=options.get("fullgraph", False))
    mask_held = functools.cache(lambda mask: mask.to("cpu"))

    def call(*args, **kwargs):
        args, kwargs = tree_map(lambda v: mask_held(v) if isinstance(v, BlockMask) else held(v), (args, kwargs))
        with _no_gpu():
            out = traced(*args, **kwargs)
        if _capturing is not None:
            _capturing.note_function(functools.partial(traced, *args, **kwargs), out)
        return tree_map(lambda t: DryTensor(t) if isinstance(t, torch.Tensor) else t, out)

    return call


def _interpret_on_held() -> None:
    """Kernels are given the tensors that are held; a graph that is being captured notes the launch."""
    from triton.runtime import interpreter

    prepare()
    GridExecutor = interpreter.GridExecutor  # noqa: N806
    interpret = GridExecutor.__call__

    def launch(self, *args, **kwargs):
        if any(isinstance(a, torch.Tensor) and not isinstance(a, DryTensor) for a in (*args, *kwargs.values())):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        args, kwargs = tree_map(held, (args, kwargs))
        if _capturing is not None:
            _capturing.note_launch(lambda: interpret(self, *args, **kwargs))
        with _disable_current_modes():
            interpret(self, *args, **kwargs)

    GridExecutor.__call__ = launch


def install() -> None:
    """Puts the stand-in in torch.cuda's place, for the rest of the process."""
    if torch.cuda.is_available():
        raise RuntimeError("dry: there is a GPU here; use it")
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("dry: triton is imported already, and does not interpret; set TRITON_INTERPRET=1")
    _triton.install(SimpleNamespace(impl=lambda op, launcher, _key: _launchers.__setitem__(op, launcher)), FALLBACKS)
    _interpret_on_held()
    stand_ins = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "synchronize": lambda device=None: None, "get_device_name": lambda d=None: NAME,
        "get_device_capability": lambda device=None: (9, 0), "Event": Event, "CUDAGraph": Graph, "graph": _capture,
        "device": lambda device: contextlib.nullcontext(), "is_current_stream_capturing": lambda: bool(_capturing),
        "get_device_properties": lambda device=None: SimpleNamespace(name=NAME, multi_processor_count=4),
        "current_stream": lambda device=None: _STREAM, "Stream": lambda device=None: _STREAM,
        "set_stream": lambda stream: None,
        "graph_pool_handle": lambda: (0, next(_pools)), "mem_get_info": lambda device=None: (8 << 30, 16 << 30)}
    for name, stand_in in stand_ins.items():
        _put(torch.cuda, name, stand_in)
    _put(torch.Tensor, "to", _to)
    _put(torch.Tensor, "cpu", lambda self, **_options: _to(self, "cpu"))
    _put(torch.Tensor, "cuda", lambda self, *_args, **_options: _to(self, DEVICE))
    _put(torch, "tensor", _from_data(torch.tensor))
    _put(torch, "as_tensor", _from_data(torch.as_tensor))
    _put(torch, "compile", functools.partial(_compile, torch.compile))
    DryMode().__enter__()


def main(words: list[str]) -> None:
    install()
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")
