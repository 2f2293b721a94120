"""The part of a decoder layer that reads what a norm gives (attention, the MLP), and what rounding costs it.

AutoAWQ judges a scale of queries, keys and values by what attention puts out, not by their own outputs: an error of a
key counts only as far as it moves attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from transload.quantize.held import Held
from transload.quantize.hidden import Hidden

_TOKENS = 1024  # that an error is measured on
Forward = Callable[[Tensor], Tensor]


@dataclass(eq=False, slots=True)
class Block:
    """A module, what it was called with on sample windows, and what it gave.

    outputs: float32 [T, H]. counts: [T, 1], how much a squared error of each token counts: one over the squared norm of
    the residual stream that the output is added to, because the next norm divides by it.
    """

    module: nn.Module
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    outputs: Tensor
    counts: Tensor

    def cost(self, weights: Sequence[tuple[Held, Tensor]]) -> float:
        """The squared error of the output, when linears have other weights [N, K]."""
        try:
            for held, weight in weights:
                held.trial = weight
            made = _first(self.module(*self.positional, **self.named))
        finally:
            for held, _ in weights:
                held.trial = None
        error = made.float().reshape(self.outputs.shape) - self.outputs
        return float((error.square().sum(1, keepdim=True) * self.counts).sum())


def sample_windows(hidden: Hidden) -> Tensor:
    """A few windows [B, T, H], evenly spread, of about a thousand tokens in all."""
    count = min(hidden.count, max(1, _TOKENS // hidden.tokens))
    return hidden[slice(0, count * (hidden.count // count), hidden.count // count)]


def block_of(layer: nn.Module, consumers: Sequence[Held], forward: Forward, windows: Tensor) -> Block | None:
    """The smallest part of the layer that holds all consumers. None when that is one linear, or the layer itself."""
    names = [name for name, m in layer.named_modules() if any(m is c for c in consumers)]
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
    if len(names) < 2 or not shared:
        return None
    module = layer.get_submodule(".".join(shared))
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def note(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        seen.append((positional, named, _first(out)))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            after = forward(windows)
    finally:
        handle.remove()
    if len(seen) != 1:
        return None
    positional, named, out = seen[0]
    tokens = after.shape[0] * after.shape[1]
    counts = after.float().reshape(tokens, -1).square().sum(1, keepdim=True).clamp(min=1e-12).reciprocal()
    return Block(module, positional, named, out.float().reshape(tokens, -1), counts)


def _first(out: Any) -> Tensor:
    made: Tensor = out if isinstance(out, Tensor) else out[0]
    return made
