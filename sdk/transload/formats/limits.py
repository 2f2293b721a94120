"""Why a layout cannot hold a weight: the checks that many writers share, each answer a sentence."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from transload.quant import Grid, QuantSpec, Zero


def integer_limits(
    spec: QuantSpec,
    shape: tuple[int, ...],
    bits: tuple[int, ...],
    zeros: tuple[Zero, ...],
    scales: tuple[torch.dtype, ...],
) -> str | None:
    """None when a layout of integer codes with these bits, zeros and scale dtypes can hold the weight, else why not."""
    if spec.grid is not Grid.INT:
        return f"it stores integer codes, not {spec.grid.value}"
    if spec.bits not in bits:
        return f"it stores codes of {listed(bits)} bits, not {spec.bits}"
    if spec.zero not in zeros:
        return f"it stores zero points as {listed(z.value for z in zeros)}, not {spec.zero.value}"
    return shape_limits(spec, shape, scales)


def shape_limits(spec: QuantSpec, shape: tuple[int, ...], scales: tuple[torch.dtype, ...]) -> str | None:
    """None for one linear [N, K] with scales of a dtype that the layout stores, else why not."""
    if len(shape) != 2:
        return f"it stores one linear [N, K] at a time, not a stack of shape {shape}; split the experts first"
    if spec.scale_dtype not in scales:
        return f"it stores {listed(map(dtype_name, scales))} scales, not {dtype_name(spec.scale_dtype)}"
    return None


def weights_only(spec: QuantSpec) -> str | None:
    """None for 16-bit activations, else why a weight-only layout refuses."""
    return None if spec.act is None else f"it is weight-only and has no place for activations {spec.act}"


def positional(spec: QuantSpec) -> str | None:
    """None when groups follow position, else why a layout without g_idx refuses."""
    return "it has no g_idx, and these groups are in act-order" if spec.act_order else None


def divided(spec: QuantSpec, k: int) -> str | None:
    """None when the group size divides K, else why not."""
    if spec.group_size > 0 and k % spec.group_size:
        return f"its group size must divide K, but K={k} is not a multiple of {spec.group_size}"
    return None


def listed(items: Iterable[object]) -> str:
    """Items as words: 2, 4 or 8."""
    words = [str(i) for i in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def dtype_name(dtype: torch.dtype) -> str:
    """float16 instead of torch.float16."""
    return str(dtype).removeprefix("torch.")
