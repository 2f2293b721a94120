"""Llama 3's stretched rotary frequencies, of which llama.cpp keeps only the finished factors (`rope_freqs.weight`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, pi

from transload.errors import FormatError, Unsupported

# Every Llama 3.1, 3.2 and 3.3 has these; only the factor differs (8 or 32), and the largest stored one is it.
_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192


def llama3_scaling(factors: Sequence[float], theta: object) -> dict[str, object]:
    """The rope_scaling of config.json that gives these factors, {} when all are 1.

    Raises Unsupported for factors that Llama 3's rule does not give.
    """
    if not all(isfinite(f) and 0 < f < 1e6 for f in factors):
        raise FormatError("rope_freqs.weight holds factors that stretch no rotary frequency: expected 1 to 64 or so")
    largest = max(factors)
    if largest == 1 and min(factors) == 1:
        return {}
    base = float(theta) if isinstance(theta, (int, float)) else 10000.0
    wanted = [_factor(base ** (i / len(factors)), largest) for i in range(len(factors))]
    if any(abs(a - b) > 1e-3 * b for a, b in zip(factors, wanted, strict=True)):
        raise Unsupported(
            f"rope_freqs.weight stretches rotary frequencies by {min(factors):g} to {largest:g}, and not by Llama 3's "
            "rule: config.json has no words for it here"
        )
    return {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": round(largest, 3),
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": _CONTEXT,
        }
    }


def llama3_factors(scaling: Mapping[str, object], theta: float, count: int) -> list[float]:
    """The factors of a rope_scaling of type llama3 for `count` rotary frequencies.

    Raises Unsupported for bounds that no Llama has, because the finished factors could not be read back.
    """
    bounds = [scaling.get(k) for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")]
    factor = scaling.get("factor")
    if bounds != [_LOW, _HIGH, _CONTEXT] or not isinstance(factor, (int, float)):
        raise Unsupported(f"config.json: rope_scaling {dict(scaling)}: of llama3, only Llama's own bounds are written")
    return [_factor(theta ** (i / count), float(factor)) for i in range(count)]


def _factor(inverse_frequency: float, factor: float) -> float:
    """By how much one frequency is slowed: not at all for short waves, fully for long ones, smoothly between."""
    wavelength = 2 * pi * inverse_frequency
    if wavelength < _CONTEXT / _HIGH:
        return 1.0
    if wavelength > _CONTEXT / _LOW:
        return factor
    smooth = (_CONTEXT / wavelength - _LOW) / (_HIGH - _LOW)
    return 1 / ((1 - smooth) / factor + smooth)
