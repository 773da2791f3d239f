"""The gate between an engine's private functions and our replacements.

Engines move their internals between releases, so a hook is installed only where the engine's version, the original's
parameters and the platform are those that it was written for. Otherwise the original stays, and the log says why.
What a hook needs of the model is decided once for each object that it works on, from configuration alone: ranks of one
group have one configuration, so they decide alike and no collective changes its order or shape between them.
"""

import functools
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MARK = "dflash_original"
Placing = Callable[["Hook", Any, str, Callable, Callable], None]  # hook, owner, attribute, original, replacement


@dataclass(frozen=True)
class Hook:
    """One function of an engine and what replaces it.

    name: what the log and the DISABLE variable call it. target: "module:function" or "module:Class.method".
    parameters: the original's, by name and in order, without a classmethod's class; a tuple of alternatives where
    releases differ. versions: the first (major, minor) it was written for, and the first that it was not.
    build(original) -> replacement. off() -> why it is left unless asked for by name, or None. prepare(): gives the
    engine, where it is not off, what is needed beside the replacement. keep() -> why the original then stays on this
    platform, or None.
    """

    name: str
    target: str
    parameters: tuple[tuple[str, ...], ...]
    versions: tuple[tuple[int, int], tuple[int, int]]
    build: Callable[[Callable], Callable]
    keep: Callable[[], str | None] = lambda: None
    off: Callable[[], str | None] = lambda: None
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """why: empty where replaced."""

    name: str
    target: str
    why: str = ""

    def __str__(self):
        return f"{self.name}: {f'left, {self.why}' if self.why else 'replaced'} ({self.target})"


def install(hooks: Iterable[Hook], version: str, environment: Mapping[str, str], prefix: str,
            log: logging.Logger, place: Placing | None = None) -> list[Outcome]:
    """Installs what can be and logs a line for each hook. Never raises; a second call finds everything in place.

    prefix: of the variables `<prefix>_DISABLE` and `<prefix>_ENABLE`, comma-separated names; the latter brings back
    hooks that are off by themselves. place: puts a replacement in, where the engine has its own way.
    """
    hooks = list(hooks)
    disabled, enabled = (_names(environment, f"{prefix}_{what}", hooks, log) for what in ("DISABLE", "ENABLE"))
    outcomes = []
    for hook in hooks:
        try:
            why = _install(hook, version, disabled, enabled, prefix, place or _set)
        except Exception as error:  # an exception in an engine's plugin would end the engine's process
            why = f"{type(error).__name__}: {error}"
        outcomes.append(Outcome(hook.name, hook.target, why))
        log.info("dflash-kernels: %s", outcomes[-1])
    return outcomes


def _names(environment: Mapping[str, str], variable: str, hooks: list[Hook], log: logging.Logger) -> set[str]:
    given = {name.strip() for name in environment.get(variable, "").split(",")} - {""}
    unknown = given - {hook.name for hook in hooks}
    if unknown:
        log.warning("dflash-kernels: %s must be of %s; got %s", variable, ",".join(hook.name for hook in hooks),
                    ",".join(sorted(unknown)))
    return given


def _install(hook: Hook, version: str, disabled: set[str], enabled: set[str], prefix: str, place: Placing) -> str:
    """Why the original stays; empty where it is replaced."""
    if hook.name in disabled:
        return f"disabled by {prefix}_DISABLE"
    first, after = hook.versions
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not first <= (int(found[1]), int(found[2])) < after:
        return f"version {version} is not of {first[0]}.{first[1]} to before {after[0]}.{after[1]}"
    if hook.name not in enabled and (why := hook.off()):
        return why
    hook.prepare()
    if why := hook.keep():
        return why
    module_name, _, path = hook.target.partition(":")
    module = importlib.import_module(module_name)
    *owners, attribute = path.split(".")
    owner = functools.reduce(getattr, owners, module)
    original = getattr(owner, attribute)
    if hasattr(original, MARK):
        return ""
    parameters = tuple(inspect.signature(original).parameters)
    if parameters not in hook.parameters:
        return f"its parameters changed: {_difference(hook.parameters[-1], parameters)}"
    of_class = isinstance(inspect.getattr_static(owner, attribute), classmethod)
    original = original.__func__ if of_class else original
    replacement = functools.update_wrapper(hook.build(original), original)
    setattr(replacement, MARK, original)
    place(hook, owner, attribute, original, classmethod(replacement) if of_class else replacement)
    return ""


def _set(hook: Hook, owner: Any, attribute: str, original: Callable, replacement: Callable) -> None:
    """`from module import function` elsewhere in the engine made copies of the name, which are replaced too."""
    setattr(owner, attribute, replacement)
    if not inspect.isclass(owner):
        _rebind(hook.target.partition(".")[0], attribute, original, replacement)


def _difference(expected: tuple[str, ...], found: tuple[str, ...]) -> str:
    gone, new = [p for p in expected if p not in found], [p for p in found if p not in expected]
    said = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(new)}"] * bool(new)
    return " and ".join(said) or f"in another order, {', '.join(found)}"


def _rebind(package: str, attribute: str, original: Callable, replacement: Callable) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and getattr(module, "__dict__", {}).get(attribute) is original:
            setattr(module, attribute, replacement)


def plan(owner: Any, name: str, decide: Callable[[Any], Any], log: logging.Logger) -> Any:
    """What decide(owner) returned the first time, kept on owner; None where the original must do it.

    decide returns a plan or says, as a str, what of the configuration is not covered. What it prepares would be only
    recorded while a CUDA graph is captured, so then the original runs, and the next call decides.
    """
    key = f"_dflash_{name}"
    kept = owner.__dict__.get(key)
    if kept is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        try:
            found = decide(owner)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        why = found if isinstance(found, str) else None
        log.info("dflash-kernels: %s: %s for this model", name, f"left, {why}" if why else "in use")
        kept = owner.__dict__[key] = (None if why else found,)
    return kept[0]
