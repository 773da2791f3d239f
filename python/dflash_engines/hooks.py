"""The gate between an engine's private functions and our replacements, and the way back from them.

Engines move their internals between releases, so a hook is installed only where the engine's version was read, the
functions are still those, and the hook was measured faster on the platform or is asked for by name. Otherwise the
original stays, and the log says why. What a hook needs of the model is decided once for each object that it works on;
what a call brings that it was not written for is left to the original, and so is everything from the first exception
on.

Ranks of one group never wait for each other in vain: a replacement has no collective before its `finish`, which has
those of the original in the same order and shapes, so it does not matter which of the two a rank runs.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import sources

if TYPE_CHECKING:  # imported where it is used: this module is part of what every process of an engine loads
    import torch

MARK = "dflash_original"
LEFT = object()  # what a replacement returns for a call that it leaves to the original; it has then changed nothing
Placing = Callable[["Hook", Any, str, Callable, Callable], None]  # hook, owner, attribute, original, replacement


@dataclass(frozen=True)
class Hook:
    """One function of an engine and what replaces it.

    name: what the log and the environment's variables call it. target: "module:function" or "module:Class.method".
    ours: takes the original's arguments; returns its result, or LEFT. An exception means that the original is called
    after it, so what ours had written by then must be what the original writes too. read: the digest of the functions'
    sources in each version of the engine that was read. measured: of each platform (see platform_of) where it was,
    whether it is faster than the original. defined: where the target's source is, if not at the target. beside: other
    functions whose work ours does too. keep() -> why the original stays on this engine's platform, or None. prepare():
    is called before it is put in place. draws: its results are drawn by random numbers of its own, so that a rank which
    goes back alone would part from the others. finish(result, arguments): makes ours' result the original's, with the
    original's collectives; what fails there fails as it would in the original.
    """

    name: str
    target: str
    ours: Callable
    read: Mapping[str, str]
    measured: Mapping[str, bool] = field(default_factory=dict)
    defined: str = ""
    beside: tuple[str, ...] = ()
    keep: Callable[[], str | None] = lambda: None
    prepare: Callable[[], None] = lambda: None
    draws: bool = False
    finish: Callable | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return self.defined or self.target, *self.beside

    def unread(self, version: str) -> str | None:
        """Why it does not know this version; what follows a plus sign says how it was built."""
        if version.partition("+")[0] in self.read:
            return None
        return f"version {version} was not read; {', '.join(self.read)} {'were' if len(self.read) > 1 else 'was'}"


@dataclass(frozen=True)
class Outcome:
    """why: empty where replaced. available: whether asking for it by name is all that is missing."""

    name: str
    target: str
    why: str = ""
    available: bool = False

    def __str__(self):
        return f"{self.name}: {f'left, {self.why}' if self.why else 'replaced'} ({self.target})"


@dataclass(frozen=True)
class Choice:
    """What `<prefix>_DISABLE` and `<prefix>_ENABLE` in the environment say, comma-separated names of hooks."""

    prefix: str
    disabled: frozenset[str]
    enabled: frozenset[str]

    @classmethod
    def of(cls, environment: Mapping[str, str], prefix: str, known: Iterable[str], log: logging.Logger) -> "Choice":
        known, given = list(known), []
        for variable in (f"{prefix}_DISABLE", f"{prefix}_ENABLE"):
            names = {name.strip() for name in environment.get(variable, "").split(",")} - {""}
            if unknown := names.difference(known):
                log.warning("dflash-kernels: %s must be of %s; got %s", variable, ",".join(known),
                            ",".join(sorted(unknown)))
            given.append(frozenset(names))
        return cls(prefix, *given)


def platform_of(device: "torch.device") -> str:
    """"cpu", a GPU's generation ("sm_90"), or the name of another kind of device."""
    import torch

    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return "rocm"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def install(hooks: Iterable[Hook], version: str, platform: str, choice: Choice, log: logging.Logger,
            place: Placing | None = None) -> list[Outcome]:
    """Installs what can be and says so in the log: a line for each hook, one for all that may be asked for. Never
    raises; a second call finds everything in place.

    place: puts a replacement in, where the engine has its own way.
    """
    outcomes = []
    for hook in hooks:
        try:
            found = _install(hook, version, platform, choice, log, place or _set)
        except Exception as error:  # an exception in an engine's plugin would end the engine's process
            found = Outcome(hook.name, hook.target, f"{type(error).__name__}: {error}")
        outcomes.append(found)
        if not found.available:
            log.info("dflash-kernels: %s", found)
    if names := ",".join(found.name for found in outcomes if found.available):
        log.info("dflash-kernels: not measured on %s yet, and so left: %s; %s_ENABLE=%s replaces them", platform,
                 names.replace(",", ", "), choice.prefix, names)
    return outcomes


def _install(hook: Hook, version: str, platform: str, choice: Choice, log: logging.Logger, place: Placing) -> Outcome:
    left = functools.partial(Outcome, hook.name, hook.target)
    if hook.name in choice.disabled:
        return left(f"disabled by {choice.prefix}_DISABLE")
    if why := hook.unread(version) or hook.keep():
        return left(why)
    faster = hook.measured.get(platform)
    if not faster and hook.name not in choice.enabled:
        return left(f"not measured on {platform} yet" if faster is None else
                    f"slower than the engine's own on {platform}", available=faster is None)
    owner, attribute, original = sources.resolve(hook.target)
    if hasattr(original, MARK):
        return left()
    texts = [sources.of_function(f) for f in (original, *(sources.resolve(b)[2] for b in hook.beside))]
    if sources.digest(texts) != hook.read[version.partition("+")[0]]:
        return left(f"its source is not that of {version}")
    replacement = guarded(hook.name, hook.ours, original, log, hook.draws, hook.finish)
    functools.update_wrapper(replacement, original)
    setattr(replacement, MARK, original)
    hook.prepare()
    of_class = isinstance(inspect.getattr_static(owner, attribute), classmethod)
    placed: Any = classmethod(replacement) if of_class else replacement
    place(hook, owner, attribute, original, placed)
    return left()


def guarded(name: str, ours: Callable, theirs: Callable, log: logging.Logger, draws: bool = False,
            finish: Callable | None = None) -> Callable:
    """ours, then finish; for a call that ours leaves or fails in, and in this process for all that follow a failure,
    theirs.

    Where it draws and there are several ranks, the failure ends this rank instead, and the engine with it.
    """
    failed = False

    def call(*args, **kwargs):
        nonlocal failed
        if not failed:
            try:
                found = ours(*args, **kwargs)
            except Exception as error:
                failed = True
                log.warning("dflash-kernels: %s: failed, and is off in this process from now on. %s: %s",
                            name, type(error).__name__, error, exc_info=True)
                if draws and _ranks() > 1:
                    raise
            else:
                if found is not LEFT:
                    return finish(found, *args, **kwargs) if finish else found
        return theirs(*args, **kwargs)

    return call


def _ranks() -> int:
    import torch

    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _set(hook: Hook, owner: Any, attribute: str, original: Callable, replacement: Callable) -> None:
    """`from module import function` elsewhere in the engine made copies of the name, which are replaced too."""
    setattr(owner, attribute, replacement)
    if inspect.isclass(owner):
        return
    package = hook.target.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and getattr(module, "__dict__", {}).get(attribute) is original:
            setattr(module, attribute, replacement)


def plan(owner: Any, name: str, decide: Callable[[Any], Any], log: logging.Logger) -> Any:
    """What decide(owner) returned the first time, kept on owner; None where the original must do it.

    decide returns a plan or says, as a str, what of the configuration is not covered. What it prepares would be only
    recorded while a CUDA graph is captured, so then the original runs, and the next call decides.
    """
    import torch

    key = f"_dflash_{name}"
    kept = owner.__dict__.get(key)
    if kept is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        found = decide(owner)
        why = found if isinstance(found, str) else None
        log.info("dflash-kernels: %s: %s for this model", name, f"left, {why}" if why else "in use")
        kept = owner.__dict__[key] = (None if why else found,)
    return kept[0]
