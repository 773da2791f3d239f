"""Installs replacements for an engine's private functions, and falls back to the originals.

Engines change their internals between releases. A hook is therefore installed only where the engine's version was read,
the functions still have the sources that were read, and the hook was measured faster on the platform or is enabled by
name. Otherwise the original stays, and the log says why. A hook checks the model once for each object that it works on.
Calls that it was not written for go to the original, and so do all calls after its first exception.

Ranks of one group never wait for each other in vain. A replacement runs no collective before its `finish`, which runs
those of the original in the same order and with the same shapes, so each rank can run either of the two.

Two functions can be replaced as one: the first puts its work off, and the engine hands what it returned to the second,
which does the work of both.
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
MEASURED = ("amx", "avx512_bf16")  # instruction sets of the CPUs in docs/engines.md
_KEY = "_dflash_{}"  # of an owner's plan
LEFT = object()  # a replacement returns this to leave the call to the original; it has then changed nothing
Placing = Callable[[str, Any, str, Callable, Callable], None]  # target, owner, attribute, original, replacement


@dataclass(frozen=True)
class Hook:
    """One function of an engine and its replacement.

    name: used in the log and in the environment variables.
    target: "module:function" or "module:Class.method".
    ours: the replacement. It takes the original's arguments and returns its result, or LEFT. After an exception the
        original is called, so ours must not have written anything that the original does not overwrite.
    read: the digest of the functions' sources, by engine version that was read.
    measured: whether ours is faster than the original, by platform (see platform_of) where it was measured.
    defined: where the target's source is, if not at the target.
    beside: other functions whose work ours also does.
    keep() -> why the original stays on this engine's platform, or None.
    prepare(): called before the replacement is installed.
    diverges: a rank that falls back alone would go another way than the others: ours draws random numbers of its own,
        or its results are data of all ranks and can differ from the original's in their last bits.
    finish(result, arguments): turns ours' result into the original's, with the original's collectives. A failure there
        is raised as it would be in the original.
    taker: the function that the engine hands the target's result to. What ours returns goes there as Deferred.
    take: the replacement of taker where it is given Deferred. After an exception taker gets the original's result.
    place: installs the replacement where setting the attribute is not enough.
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
    diverges: bool = False
    finish: Callable | None = None
    taker: str = ""
    take: Callable | None = None
    place: Placing | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return self.defined or self.target, *([self.taker] if self.taker else []), *self.beside

    def unread(self, version: str) -> str | None:
        """Why the hook does not support this version. The part after a plus sign names the build and is ignored."""
        if version.partition("+")[0] in self.read:
            return None
        return f"version {version} was not read; {', '.join(self.read)} {'were' if len(self.read) > 1 else 'was'}"


@dataclass(frozen=True)
class Deferred:
    """made: what ours returned. original(): the call that was put off, by the engine's function."""

    made: Any
    original: Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """why: empty where replaced. available: whether enabling it by name would replace it."""

    name: str
    target: str
    why: str = ""
    available: bool = False

    def __str__(self):
        return f"{self.name}: {f'not replaced, {self.why}' if self.why else 'replaced'} ({self.target})"


@dataclass(frozen=True)
class Choice:
    """The hooks named in the environment variables `<prefix>_DISABLE` and `<prefix>_ENABLE`, separated by commas."""

    prefix: str
    disabled: frozenset[str]
    enabled: frozenset[str]

    @classmethod
    def of(cls, environment: Mapping[str, str], prefix: str, known: Iterable[str], log: logging.Logger) -> "Choice":
        known, given = list(known), []
        for variable in (f"{prefix}_DISABLE", f"{prefix}_ENABLE"):
            names = named_in(environment, variable)
            if unknown := names.difference(known):
                log.warning("dflash-kernels: %s must be names of %s; got %s", variable, ",".join(known),
                            ",".join(sorted(unknown)))
            given.append(names)
        return cls(prefix, *given)


def named_in(environment: Mapping[str, str], variable: str) -> frozenset[str]:
    return frozenset(name.strip() for name in environment.get(variable, "").split(",")) - {""}


def platform_of(device: "torch.device") -> str:
    """"cpu" with an instruction set that hooks were measured with, or with its name ("cpu_avx2", "cpu_reference" where
    there are no kernels); a GPU's generation ("sm_90"); or the name of another kind of device."""
    import torch

    if device.type == "cpu":
        from dflash_kernels import build_info

        isa = build_info()["isa"]
        return "cpu" if isa in MEASURED else f"cpu_{isa}"
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return "rocm"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def install(hooks: Iterable[Hook], version: str, platform: str, choice: Choice, log: logging.Logger,
            place: Placing | None = None) -> list[Outcome]:
    """Installs the hooks that apply, and logs a line for each, and one for all that can be enabled by name.

    Never raises. A second call changes nothing. place: installs a replacement where the engine has a way of its own.
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
        log.info("dflash-kernels: not replaced, because not measured on %s yet: %s; enable with %s_ENABLE=%s", platform,
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
    texts = [sources.of_function(f) for f in (original, *(sources.resolve(s)[2] for s in hook.sources[1:]))]
    if sources.digest(texts) != hook.read[version.partition("+")[0]]:
        return left(f"its source is not that of {version}")
    place = hook.place or place
    hook.prepare()
    ours = hook.ours
    if hook.taker:  # first, because it also takes what the original returns
        _replace(hook.taker, _taking(hook, sources.resolve(hook.taker)[2], log), place)
        ours = _deferring(ours, original)
    _replace(hook.target, guarded(hook.name, ours, original, log, hook.diverges, hook.finish), place)
    return left()


def _replace(target: str, replacement: Callable, place: Placing) -> None:
    owner, attribute, original = sources.resolve(target)
    functools.update_wrapper(replacement, original)
    setattr(replacement, MARK, original)
    of_class = isinstance(inspect.getattr_static(owner, attribute), classmethod)
    placed: Any = classmethod(replacement) if of_class else replacement
    place(target, owner, attribute, original, placed)


def _deferring(ours: Callable, original: Callable) -> Callable:
    def call(*args, **kwargs):
        found = ours(*args, **kwargs)
        return found if found is LEFT else Deferred(found, functools.partial(original, *args, **kwargs))

    return call


def _taking(hook: Hook, original: Callable, log: logging.Logger) -> Callable:
    def ours(*args, **kwargs):
        deferred = any(isinstance(value, Deferred) for value in (*args, *kwargs.values()))
        return hook.take(*args, **kwargs) if hook.take and deferred else LEFT

    def theirs(*args, **kwargs):
        given = [value.original() if isinstance(value, Deferred) else value for value in args]
        return original(*given, **{name: value.original() if isinstance(value, Deferred) else value
                                   for name, value in kwargs.items()})

    return guarded(hook.name, ours, theirs, log, hook.diverges)


def guarded(name: str, ours: Callable, theirs: Callable, log: logging.Logger, diverges: bool = False,
            finish: Callable | None = None) -> Callable:
    """Runs ours, then finish. Runs theirs where ours returns LEFT or raises, and in every call after a failure.

    If the ways diverge and there are several ranks, a failure is raised instead and ends the engine.
    """
    failed = False

    def call(*args, **kwargs):
        nonlocal failed
        if not failed:
            try:
                found = ours(*args, **kwargs)
            except Exception as error:
                failed = True
                log.warning("dflash-kernels: %s: failed and is now off in this process. %s: %s",
                            name, type(error).__name__, error, exc_info=True)
                if diverges and _ranks() > 1:
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


def _set(target: str, owner: Any, attribute: str, original: Callable, replacement: Callable) -> None:
    """Also replaces the names that `from module import function` made elsewhere in the engine."""
    setattr(owner, attribute, replacement)
    if inspect.isclass(owner):
        return
    package = target.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and getattr(module, "__dict__", {}).get(attribute) is original:
            setattr(module, attribute, replacement)


def plan(owner: Any, name: str, decide: Callable[[Any], Any], log: logging.Logger) -> Any:
    """The plan that decide(owner) returned the first time, kept on owner; None where the original must run.

    decide returns a plan, or a str that names the part of the configuration that is not covered. During the capture of
    a CUDA graph its preparations would only be recorded, so the original runs then and the next call decides.
    """
    import torch

    key = _KEY.format(name)
    kept = owner.__dict__.get(key)
    if kept is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        found = decide(owner)
        why = found if isinstance(found, str) else None
        log.info("dflash-kernels: %s: %s", name,
                 f"not active for this model, {why}" if why else "active for this model")
        kept = owner.__dict__[key] = (None if why else found,)
    return kept[0]


def forget(owner: Any, name: str) -> None:
    """Has the next call of `plan` decide again."""
    owner.__dict__.pop(_KEY.format(name), None)
