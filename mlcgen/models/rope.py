"""Rotary position embedding (Su et al. 2021, RoFormer): frequencies, with the scalings that HF configs name."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from mlcgen.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True)
class Rope:
    """cos and sin of position * inv_freq[i], both times `attention_factor`; pairs are (i, i + head_dim/2)."""

    inv_freq: tuple[float, ...]  # (head_dim/2,)
    attention_factor: float = 1.0


def parse_rope(hf: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    """Rope from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    scaling: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = hf.get(name) or {}
        if not isinstance(given, Mapping):
            raise CheckpointError(f"config field {name!r} = {given!r:.80} should be an object")
        scaling |= given
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = _number(scaling, "rope_theta", hf.get("rope_theta") or 10000.0)
    if scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedError("config field 'partial_rotary_factor' other than 1.0 is not supported")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UnsupportedError(f"rope_scaling type {kind!r} is not supported; have: {', '.join(_SCALINGS)}")
    try:
        inv_freq = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        rope = _SCALINGS[kind](inv_freq, scaling, theta, max_positions)
    except ArithmeticError as error:
        raise CheckpointError(f"rope_theta {theta} and rope_scaling {scaling} give no frequencies: {error}") from error
    if not all(map(math.isfinite, (*rope.inv_freq, rope.attention_factor))):
        raise CheckpointError(f"rope_theta {theta} and rope_scaling {scaling} give frequencies that are not finite")
    return rope


def _number(scaling: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = scaling.get(name)
    value = default if value is None else value
    if not _is_positive(value):
        raise CheckpointError(f"rope_scaling field {name!r} = {value!r} should be a positive number")
    return float(value)


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300


def _default(inv_freq: list[float], scaling: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    return Rope(tuple(inv_freq))


def _linear(inv_freq: list[float], scaling: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    """Position interpolation (Chen et al. 2023): positions divided by the factor."""
    factor = _number(scaling, "factor")
    return Rope(tuple(f / factor for f in inv_freq))


def _llama3(inv_freq: list[float], scaling: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a linear blend between."""
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor", 1.0), _number(scaling, "high_freq_factor", 4.0)
    original = _number(scaling, "original_max_position_embeddings", 8192)

    def scale(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)  # full turns within the original context
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - blend) * frequency / factor + blend * frequency

    return Rope(tuple(scale(f) for f in inv_freq))


def _yarn(inv_freq: list[float], scaling: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    """YaRN (Peng et al. 2023): interpolate dimensions that turn rarely, keep those that turn often (section 3.2),
    and scale attention by 0.1 ln(factor) + 1 (section 3.4)."""
    half = len(inv_freq)
    original = _number(scaling, "original_max_position_embeddings", max_positions)
    factor = _number(scaling, "factor", max_positions / original)

    def dimension(turns: float) -> float:
        """The (fractional) pair index that makes this many turns within the original context."""
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dimension(_number(scaling, "beta_fast", 32)), dimension(_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = [min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0) for i in range(half)]
    blended = tuple(f / factor * r + f * (1 - r) for f, r in zip(inv_freq, ramp, strict=True))
    return Rope(blended, _yarn_attention_factor(scaling, factor))


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(_number(scaling, "mscale")) / mscale(_number(scaling, "mscale_all_dim"))
    return mscale(1.0)


def _factors(inv_freq: list[float], scaling: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
    """One divisor per frequency: how GGUF files store Llama 3's scaling."""
    factors = scaling.get("factors")
    if not isinstance(factors, list) or len(factors) != len(inv_freq) or not all(map(_is_positive, factors)):
        raise CheckpointError(f"rope_scaling needs {len(inv_freq)} 'factors', positive numbers")
    return Rope(tuple(f / d for f, d in zip(inv_freq, factors, strict=True)))


_SCALINGS: dict[str, Callable[[list[float], Mapping[str, Any], float, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
}
