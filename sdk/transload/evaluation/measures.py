"""The measures, as plain maths over logits: loss, KL divergence, agreement, signal to noise.

Everything is per token and in float32: a KL divergence below 1e-6 is noise of the sums over the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TOP = 5


@dataclass(frozen=True, slots=True)
class Compared:
    """A model beside its source on the same T tokens; float32 [T] on the CPU unless said.

    loss: -log p of the token in nats. kl: nats, from the source to the model. likeliest: int64, the token that each
    expects most. top5: share of the source's five likeliest tokens among the model's five.
    """

    loss: Tensor
    source_loss: Tensor
    kl: Tensor
    likeliest: Tensor
    source_likeliest: Tensor
    top5: Tensor

    @classmethod
    def join(cls, parts: Sequence[Compared]) -> Compared:
        """The tokens of several, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def compare(logits: Tensor, source: Tensor, targets: Tensor) -> Compared:
    """logits and source: float [T, V] of the model and of its source; targets: int64 [T]."""
    p, q = source.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    own, theirs = q.topk(min(TOP, q.shape[-1])).indices, p.topk(min(TOP, q.shape[-1])).indices
    shared = (own.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)
    pick = targets.unsqueeze(-1)
    loss, source_loss = -q.gather(-1, pick).squeeze(-1), -p.gather(-1, pick).squeeze(-1)
    found = (loss, source_loss, kl, own[:, 0], theirs[:, 0], shared)
    return Compared(*(tensor.cpu() for tensor in found))


class Sqnr:
    """Signal to quantization noise in dB, over everything that is added: 10 log10(sum s^2 / sum (s - x)^2)."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, signal: Tensor, x: Tensor) -> None:
        """signal: of the source; x: of the model; of one shape."""
        s = signal.double()
        self._signal += float(s.square().sum())
        self._noise += float((s - x.double()).square().sum())

    @property
    def db(self) -> float:
        """Decibels; infinite where nothing differs."""
        if self._noise == 0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal > 0 else -math.inf


def perplexity(loss: Tensor) -> float:
    """exp of the mean loss; infinite where that overflows."""
    mean = float(loss.double().mean())
    return math.exp(mean) if mean < 700 else math.inf


def standard_error(values: Tensor) -> float:
    """Of the mean, as if tokens were independent (they are not quite: read it as a lower bound)."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
