"""Rotary embeddings as configs describe them, turned into one cos/sin table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
}
_REQUIRED = {
    "default": set(), "linear": {"factor"}, "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_HARMLESS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class Rope:
    """rotary_dim: the leading part of a head that turns. kind: default, linear, llama3 or yarn, with its parameters."""

    theta: float
    rotary_dim: int
    kind: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict)
    interleaved: bool = False

    def table(self, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """(length, rotary_dim) float32: the cosines of each position, then the sines, both times the yarn factor.

        The frequencies are made in float32 in the order of operations of transformers, which checkpoints were trained
        with: at position 10,000 a better rounded frequency is another angle.
        """
        inverse, factor = self._frequencies()
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
        return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1).to(device)

    def _frequencies(self) -> tuple[torch.Tensor, float]:
        p, powers = self.parameters, self.theta ** (torch.arange(0, self.rotary_dim, 2).float() / self.rotary_dim)
        inverse = 1.0 / powers
        if self.kind == "linear":
            return inverse / p["factor"], 1.0
        if self.kind == "llama3":
            return _llama3(inverse, p), 1.0
        if self.kind == "yarn":
            return _yarn(powers, self.theta, self.rotary_dim, p)
        return inverse, 1.0


def _llama3(inverse, p):
    """Llama 3.1: long waves are stretched by factor, short ones stay, those between are mixed."""
    low, high, old = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    wave = 2 * math.pi / inverse
    scaled = torch.where(wave > old / low, inverse / p["factor"], inverse)
    smooth = (old / wave - low) / (high - low)
    mixed = (1 - smooth) * scaled / p["factor"] + smooth * scaled
    between = ~(wave < old / high) & ~(wave > old / low)
    return torch.where(between, mixed, scaled)


def _yarn(powers, theta, dim, p):
    """YaRN, arXiv 2309.00071; the attention factor is that of transformers and of DeepSeek's mscale."""
    factor, old = p["factor"], p["original_max_position_embeddings"]

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


def read_rope(config: Mapping, head_dim: int, what: str) -> Rope:
    """The Rope of a config.json: rope_parameters (new) or rope_theta + rope_scaling (old), whole or partial.

    what: names the config in errors. Raises ValueError for a wrong or missing value, NotImplementedError for a kind or
    key that is not supported.
    """
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in new.values()):
        raise NotImplementedError(f"{what}: rope_parameters for each layer type are not supported; got {dict(new)}")
    merged = {**old, **new}
    kind = merged.get("rope_type", merged.get("type")) or "default"
    if kind not in _KEYS:
        raise NotImplementedError(f"{what}: rope type must be one of {', '.join(_KEYS)}; got {kind!r}")
    unknown = {k for k, v in merged.items() if v is not None} - _KEYS[kind] - _HARMLESS
    if unknown:
        raise NotImplementedError(f"{what}: rope field {sorted(unknown)[0]!r} of type {kind!r} is not supported")
    parameters = {k: merged[k] for k in _KEYS[kind] if merged.get(k) is not None}
    if kind == "yarn":
        parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    missing = {k for k in _REQUIRED[kind] if k not in parameters}
    if missing:
        raise ValueError(f"{what}: rope type {kind!r} must have {sorted(missing)[0]!r}; got {merged}")
    theta = new.get("rope_theta") or config.get("rope_theta") or old.get("rope_theta") or 10000.0
    interleaved = bool(config.get("rope_interleaved") or False) or config.get("is_neox_style") is False
    return Rope(float(theta), _rotary_dim(config, merged, head_dim, what), kind, parameters, interleaved)


def _rotary_dim(config, merged, head_dim, what):
    factor = merged.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    dim = config.get("rotary_dim")
    if dim is None:
        dim = int(head_dim * (1.0 if factor is None else factor))
    elif factor is not None and int(head_dim * factor) != dim:
        raise ValueError(f"{what}: rotary_dim must be head_dim * partial_rotary_factor = {int(head_dim * factor)}; "
                         f"got {dim}")
    if not 2 <= dim <= head_dim or dim % 2:
        raise ValueError(f"{what}: rotary_dim must be even and between 2 and head_dim = {head_dim}; got {dim}")
    return dim
