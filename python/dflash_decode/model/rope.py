"""Turns the rotary embedding of a config into one cos/sin table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dflash_kernels import PagedKV

from ..checkpoint.fields import FLOAT_MAX, FLOAT_MIN, Fields, shown

_LENGTH = "original_max_position_embeddings"
# Rope type -> its parameters, and whether they must be there.
_KEYS = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True, _LENGTH: True},
    "yarn": {"factor": True, _LENGTH: True, "attention_factor": False, "beta_fast": False, "beta_slow": False,
             "mscale": False, "mscale_all_dim": False, "truncate": False},
    "dynamic": {"factor": True, _LENGTH: False},
    "longrope": {"short_factor": True, "long_factor": True, "attention_factor": True, _LENGTH: False, "factor": False},
}
_HARMLESS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_BETA = "llama_4_scaling_beta"


@dataclass(frozen=True)
class Rope:
    """rotary_dim: the leading part of a head that is rotated; 0 is none (NoPE). kind: default, linear, llama3, yarn,
    longrope, or dynamic (which is default up to max_position_embeddings), with its parameters. growth: (beta, tokens)
    of a rope that also multiplies position p by 1 + beta * log(1 + p // tokens), as Ministral 3 does its queries."""

    theta: float
    rotary_dim: int
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    growth: tuple[float, float] | None = None

    @property
    def longest(self) -> int:
        """The positions that yarn stretches the original ones to: model cards add it and leave
        max_position_embeddings as it was. 0 for other kinds."""
        return int(self.parameters["factor"] * self.parameters[_LENGTH]) if self.kind == "yarn" else 0

    def table(self, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """(length, rotary_dim) float32: the cosines of each position, then the sines, both times the yarn factor and
        the growth.

        The frequencies are computed in float32 in the order of operations of transformers, which checkpoints were
        trained with: at position 10,000 a more exact frequency is another angle.
        """
        inverse, factor = self._frequencies()
        positions = torch.arange(length, dtype=torch.float32)[:, None]
        angles = positions * inverse
        table = torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)
        if self.growth is not None:
            beta, tokens = self.growth
            table *= 1 + beta * (1 + (positions / tokens).floor()).log()
        return table.to(device)

    def check(self, what: str) -> None:
        """Raises ValueError for parameters that are valid one by one but give no angle together."""
        inverse, factor = self._frequencies()
        most = factor if self.growth is None else factor * (1 + self.growth[0] * math.log(1 + 2**31 / self.growth[1]))
        if not bool(torch.isfinite(inverse).all()) or not FLOAT_MIN <= factor <= most <= FLOAT_MAX:
            raise ValueError(f"{what}: rope of type {self.kind!r} must give finite frequencies; got theta "
                             f"{self.theta:g} with {shown(dict(self.parameters))}")

    def _frequencies(self) -> tuple[torch.Tensor, float]:
        p, powers = self.parameters, self.theta ** (torch.arange(0, self.rotary_dim, 2).float() / self.rotary_dim)
        inverse = 1.0 / powers
        if self.kind == "linear":
            return inverse / p["factor"], 1.0
        if self.kind == "llama3":
            return _llama3(inverse, p), 1.0
        if self.kind == "yarn":
            return _yarn(powers, self.theta, self.rotary_dim, p)
        if self.kind == "longrope":
            return 1.0 / (torch.tensor(p["long_factor"]) * powers), p["attention_factor"]
        return inverse, 1.0


class RopeTable:
    """A cos/sin table on `device`, None where nothing is rotated. It grows on demand to at most `most` rows, because a
    config can allow far more positions than memory holds."""

    def __init__(self, rope: Rope, most: int, device: torch.device):
        self._rope, self._most, self._device = rope, most, device
        self._table: torch.Tensor | None = None

    def reaching(self, caches: Sequence[PagedKV], width: int) -> torch.Tensor | None:
        """A table for passes of `width` tokens on these pages: a row for every position in them and for a block past
        their end, but at most `most` rows. A table never moves; a longer one is another tensor."""
        if not self._rope.rotary_dim:
            return None
        need = min(caches[0].k.shape[0] * caches[0].page_size + width, self._most)
        if self._table is None or len(self._table) < need:
            doubled = 1 << (need - 1).bit_length()  # passes of other sizes need a few rows more, and share it
            self._table = self._rope.table(min(doubled, self._most), self._device)
        return self._table


class RopeTables:
    """The tables of a model's layers. Layers with the same rope share one."""

    def __init__(self, ropes: Sequence[Rope], most: int, device: torch.device):
        kinds = [rope for i, rope in enumerate(ropes) if rope not in ropes[:i]]
        self._tables = [RopeTable(rope, most, device) for rope in kinds]
        self._of_layer = [kinds.index(rope) for rope in ropes]

    def reaching(self, caches: Sequence[PagedKV], width: int) -> list[torch.Tensor | None]:
        """The table of each layer, as RopeTable.reaching."""
        tables = [table.reaching(caches, width) for table in self._tables]
        return [tables[i] for i in self._of_layer]

    def runs(self) -> list[tuple[int, int]]:
        """(first, end) of each run of neighbouring layers that share a table."""
        starts = [i for i, kind in enumerate(self._of_layer) if i == 0 or kind != self._of_layer[i - 1]]
        return list(zip(starts, [*starts[1:], len(self._of_layer)], strict=True))


def _llama3(inverse, p):
    """Llama 3.1: long wavelengths are stretched by factor, short ones stay, those in between are interpolated."""
    low, high, old = p["low_freq_factor"], p["high_freq_factor"], p[_LENGTH]
    wave = 2 * math.pi / inverse
    scaled = torch.where(wave > old / low, inverse / p["factor"], inverse)
    smooth = (old / wave - low) / (high - low)
    mixed = (1 - smooth) * scaled / p["factor"] + smooth * scaled
    between = ~(wave < old / high) & ~(wave > old / low)
    return torch.where(between, mixed, scaled)


def _yarn(powers, theta, dim, p):
    """YaRN, arXiv 2309.00071; the attention factor is that of transformers and of DeepSeek's mscale."""
    factor, old = p["factor"], p[_LENGTH]

    def mscale(scale, by=1.0):
        return 1.0 if scale <= 1 else 0.1 * by * math.log(scale) + 1.0

    attention = p.get("attention_factor")
    if attention is None:
        by, by_all = p.get("mscale"), p.get("mscale_all_dim")
        attention = mscale(factor, by) / mscale(factor, by_all) if by and by_all else mscale(factor)

    def turns(rotations):
        return dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns(p.get("beta_fast") or 32), turns(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(attention)


def read_ropes(config: Mapping, head_dim: int, what: str, types: Sequence[str]) -> tuple[Rope, ...]:
    """The Rope of each layer of a drafter; rope_parameters can hold those of each layer type. types: of each layer.

    A theta must be given: engines assume different ones where there is none. Raises as read_rope.
    """
    f = Fields(what, config)
    given = f.table("rope_parameters", {})
    if not _by_type(given):
        return (read_rope(config, head_dim, what, theta=None),) * len(types)
    kinds = {}
    for kind in dict.fromkeys(types):
        table = Fields(f"{what}: rope_parameters", given).table(kind)
        kinds[kind] = read_rope({**config, "rope_parameters": table}, head_dim, what, theta=None)
    return tuple(kinds[kind] for kind in types)


def _by_type(parameters: Mapping) -> bool:
    known = _HARMLESS.union(*_KEYS.values())
    return any(isinstance(value, Mapping) and name not in known for name, value in parameters.items())


def read_rope(config: Mapping, head_dim: int, what: str, theta: float | None = 10000.0,
              bounded: bool = False, more: frozenset[str] = frozenset()) -> Rope:
    """The Rope of a config.json: rope_parameters (new) or rope_theta + rope_scaling (old), full or partial.

    what: names the config in errors. theta: where the config has none; None: it must have one. bounded: no position
    reaches max_position_embeddings, beyond which the angles of a dynamic rope depend on the whole length. more: other
    fields that may be there. Raises ValueError for a wrong or missing value or two that differ, and
    NotImplementedError for an unsupported kind or key.
    """
    f = Fields(what, config)
    new, old = f.table("rope_parameters", {}), f.table("rope_scaling", {})
    if _by_type(new):
        raise NotImplementedError(f"{what}: rope_parameters for each layer type are not supported; got "
                                  f"{shown(dict(new))}")
    scaling, every = Fields(what, new, old), Fields(what, new, config, old)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kinds = [name for name in _KEYS if bounded or name != "dynamic"]
    if not isinstance(kind, str) or kind not in kinds:
        raise NotImplementedError(f"{what}: rope type must be one of {', '.join(kinds)}; got {shown(kind)}")
    given = {k for place in (new, old) for k, v in place.items() if v is not None}
    unknown = given - set(_KEYS[kind]) - _HARMLESS - more
    if unknown:
        raise NotImplementedError(f"{what}: rope field {shown(sorted(unknown, key=str)[0])} of type {kind!r} is not "
                                  "supported")
    interleaved = f.flag("rope_interleaved", False) or not f.flag("is_neox_style", f.flag("rope_is_neox_style", True))
    rotary_dim = _rotary_dim(f, Fields(what, new, old, config), head_dim)
    if not rotary_dim:
        return Rope(1.0, 0)
    base = every.number("rope_theta", ... if theta is None else theta, above=1.0)
    thetas = [place["rope_theta"] for place in every.places if place.get("rope_theta") is not None]
    if any(other != base for other in thetas):
        raise ValueError(f"{what}: rope_theta must be the same at the top level and in rope_parameters; "
                         f"got {shown(thetas)}")
    parameters = _longrope(scaling, rotary_dim) if kind == "longrope" else _parameters(kind, config, scaling)
    rope = Rope(base, rotary_dim, kind, parameters, interleaved)
    rope.check(what)
    return rope


def read_growing_ropes(config: Mapping, head_dim: int, what: str) -> tuple[Rope, Rope]:
    """The ropes of keys and of queries, which grow with their position. Raises as read_rope."""
    rope = read_rope(config, head_dim, what, bounded=True, more=frozenset((_BETA, "max_position_embeddings")))
    f = Fields(what, config)
    scaling = Fields(what, f.table("rope_parameters", {}), f.table("rope_scaling", {}), rope.parameters)
    queries = replace(rope, growth=(scaling.number(_BETA, least=0.0), scaling.number(_LENGTH, above=0.0)))
    queries.check(what)
    return rope, queries


def _parameters(kind: str, config: Mapping, scaling: Fields) -> dict[str, Any]:
    """The given parameters, each checked for the range in which its formula is defined."""
    if kind == "yarn":
        scaling = Fields(scaling.what, *scaling.places, {_LENGTH: config.get("max_position_embeddings")})
    found: dict[str, Any] = {}
    for name, needed in _KEYS[kind].items():
        if not needed and scaling.get(name) is None:
            continue
        if name == "truncate":
            found[name] = scaling.flag(name)
        elif name.startswith("mscale"):
            found[name] = scaling.number(name, least=0.0)
        else:
            found[name] = scaling.number(name, above=0.0)
    if kind == "llama3" and found["high_freq_factor"] <= found["low_freq_factor"]:
        scaling.refuse("high_freq_factor", f"above low_freq_factor = {found['low_freq_factor']:g}",
                       found["high_freq_factor"])
    if kind == "yarn" and found.get("beta_fast", 32.0) < found.get("beta_slow", 1.0):
        scaling.refuse("beta_fast", f"at least beta_slow = {found.get('beta_slow', 1.0):g}",
                       found.get("beta_fast", 32.0))
    return found


def _longrope(scaling: Fields, rotary_dim: int) -> dict[str, Any]:
    """Factors of each frequency, which must be the same at every length."""
    short, long = (scaling.items(name, kind=(int, float), each="numbers") for name in ("short_factor", "long_factor"))
    if list(short) != list(long):
        raise NotImplementedError(f"{scaling.what}: rope of type 'longrope' whose factors change with the length is "
                                  "not supported")
    if len(long) != rotary_dim // 2 or not all(0 < factor <= FLOAT_MAX for factor in long):
        scaling.refuse("long_factor", f"{rotary_dim // 2} numbers above 0", list(long))
    return {"long_factor": tuple(map(float, long)), "attention_factor": scaling.number("attention_factor", above=0.0)}


def _rotary_dim(f: Fields, every: Fields, head_dim: int) -> int:
    factor = every.number("partial_rotary_factor", None, least=0.0, most=1.0)
    whole = int(head_dim * (1.0 if factor is None else factor))
    dim = f.whole("rotary_dim", whole, least=0)
    if factor is not None and whole != dim:
        raise ValueError(f"{f.what}: rotary_dim must be head_dim * partial_rotary_factor = {whole}; got {dim}")
    if not (2 <= dim <= head_dim or dim == factor == 0) or dim % 2:
        raise ValueError(f"{f.what}: rotary_dim must be even and between 2 and head_dim = {head_dim}; got {dim}")
    return dim
