"""From tokens to numbers: the difference between a model and its source, and where it is largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transload.evaluation.measures import Compared, Sqnr, standard_error
from transload.evaluation.reader import Layers
from transload.evaluation.result import Difference, WorstToken
from transload.evaluation.windows import Window

_SMALLEST = -8  # the histogram's first bin holds everything below 10^-7
_BINS = 10  # its last one everything from 10 nats on
_BEFORE = 12  # tokens shown before a bad one


def difference(
    parts: Sequence[Compared], windows: Sequence[Window], sqnr: dict[str, float], tokenizer: Any, worst: int
) -> Difference:
    """parts: one a window, in the text's order."""
    all_ = Compared.join(parts)
    paired = all_.loss - all_.source_loss
    ratio = math.exp(min(float(paired.double().mean()), 700))
    return Difference(
        perplexity_increase=ratio - 1,
        perplexity_increase_error=ratio * standard_error(paired),
        kl=float(all_.kl.double().mean()),
        kl_error=standard_error(all_.kl),
        kl_p99=float(all_.kl.quantile(0.99)) if len(all_.kl) < 2**24 else float(all_.kl[: 2**24].quantile(0.99)),
        kl_max=float(all_.kl.max()),
        top1=float((all_.likeliest == all_.source_likeliest).double().mean()),
        top5=float(all_.top5.double().mean()),
        sqnr=sqnr,
        kl_by_window=tuple(float(part.kl.mean()) for part in parts),
        kl_histogram=_histogram(all_.kl),
        worst=_worst(all_, windows, tokenizer, worst),
    )


class LayerNoise:
    """SQNR of every layer's output, over the windows that are added."""

    def __init__(self) -> None:
        self._sqnr: list[Sqnr] = []

    def add(self, source: Layers, own: Layers) -> None:
        """The same tokens' outputs of the source and of the model."""
        self._sqnr = self._sqnr or [Sqnr() for _ in source]
        for sqnr, s, x in zip(self._sqnr, source, own, strict=True):
            sqnr.add(s, x)

    def by_layer(self) -> dict[str, float]:
        """Decibels by name. Hidden states are the embedding's, every layer's, and the last layer's after the norm."""
        last = len(self._sqnr) - 1
        names = ("embedding" if i == 0 else "final norm" if i == last else f"layer {i - 1}" for i in range(last + 1))
        return {name: sqnr.db for name, sqnr in zip(names, self._sqnr, strict=True)}


def _histogram(kl: Tensor) -> tuple[int, ...]:
    powers = kl.clamp(min=10.0**_SMALLEST).log10().floor().long() - _SMALLEST
    return tuple(torch.bincount(powers.clamp(0, _BINS - 1), minlength=_BINS).tolist())


def _worst(all_: Compared, windows: Sequence[Window], tokenizer: Any, count: int) -> tuple[WorstToken, ...]:
    text = torch.cat([windows[0].ids[:1], *(w.ids[w.first :] for w in windows)])
    out = []
    for at in all_.kl.topk(min(count, len(all_.kl))).indices.tolist():
        position = at + 1  # the text's first token is not predicted
        out.append(
            WorstToken(
                position=position,
                before=tokenizer.decode(text[max(position - _BEFORE, 0) : position]),
                token=tokenizer.decode(text[position : position + 1]),
                kl=float(all_.kl[at]),
                probability=math.exp(-float(all_.loss[at])),
                source_probability=math.exp(-float(all_.source_loss[at])),
                likeliest=tokenizer.decode(all_.likeliest[at : at + 1]),
                source_likeliest=tokenizer.decode(all_.source_likeliest[at : at + 1]),
            )
        )
    return tuple(out)
