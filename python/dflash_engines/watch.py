"""Runs callbacks when an engine imports a module or creates an object, without importing the engine."""

import functools
import importlib.abc
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], object]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a module through the other finders, and runs the callbacks for it after its import."""

    def __init__(self):
        self.waiting: dict[str, list[tuple[Then, logging.Logger]]] = {}

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        others = (finder.find_spec(name, path, target) for finder in list(sys.meta_path)
                  if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for found in others if found), None)
        loader: Any = spec.loader if spec else None
        if hasattr(loader, "exec_module"):
            execute = loader.exec_module

            def exec_module(module):
                del loader.exec_module  # the class's own again
                execute(module)
                for then, log in self.waiting.pop(name, ()):
                    _quietly(then, module, log)

            loader.exec_module = exec_module
        return spec


_FINDER = _Finder()


def when_imported(name: str, then: Then, log: logging.Logger) -> None:
    """Calls then(module) once: now if the module is loaded, else right after its import. The same `then` is registered
    once.

    An exception in it becomes a log line, so that it cannot break an import.
    """
    module = sys.modules.get(name)
    if module is not None:
        return _quietly(then, module, log)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    waiting = _FINDER.waiting.setdefault(name, [])
    if (then, log) not in waiting:
        waiting.append((then, log))


def when_made(cls: Any, then: Callable[[Mapping[str, Any]], object], log: logging.Logger) -> None:
    """Calls then(arguments) with the arguments by name before each object of cls is initialised. Never raises. A class
    is watched once."""
    original = cls.__init__
    if hasattr(original, "dflash_watched"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        _quietly(lambda _: then(signature.bind(self, *args, **kwargs).arguments), None, log)
        original(self, *args, **kwargs)

    watched: Any = __init__
    watched.dflash_watched = original
    cls.__init__ = watched


def _quietly(then: Callable[[Any], object], value: Any, log: logging.Logger) -> None:
    try:
        then(value)
    except Exception as error:  # it would end the engine's process
        log.warning("dflash-kernels: nothing replaced, %s: %s", type(error).__name__, error)
