"""What an evaluation found: plain numbers, ready for JSON, tables and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Subject:
    """One of the models. kernels: lines such as "168 x W4A8 native-vnni"; bytes as the model occupies here.

    read_per_second: tokens of text; write_per_second: generated tokens, None where nothing was generated.
    """

    path: str
    format: str
    scheme: str
    kernels: tuple[str, ...]
    weight_bytes: int
    perplexity: float
    perplexity_error: float
    read_per_second: float
    write_per_second: float | None


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A token where the model differs most. position counts from the text's start; probabilities are of that token."""

    position: int
    before: str
    token: str
    kl: float
    probability: float
    source_probability: float
    likeliest: str
    source_likeliest: str


@dataclass(frozen=True, slots=True)
class Difference:
    """The model beside its source. kl in nats per token; top1 and top5 are shares; SQNR in dB by layer output.

    perplexity_increase is relative (0.02 = 2 % more), its error is of the paired difference, both models having read
    the same tokens. kl_by_window: means, in the text's order. kl_histogram: tokens by power of ten, from 1e-8 on.
    """

    perplexity_increase: float
    perplexity_increase_error: float
    kl: float
    kl_error: float
    kl_p99: float
    kl_max: float
    top1: float
    top5: float
    sqnr: Mapping[str, float]
    kl_by_window: tuple[float, ...]
    kl_histogram: tuple[int, ...]
    worst: tuple[WorstToken, ...]


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Everything that `evaluate` measured. peak_memory: of the whole process, bytes."""

    model: Subject
    source: Subject | None
    difference: Difference | None
    text: str
    tokens: int
    window: int
    stride: int
    peak_memory: int

    def metrics(self) -> dict[str, float]:
        """The single numbers by the names that limits use."""
        out = {"ppl": self.model.perplexity, "read": self.model.read_per_second}
        if self.model.write_per_second is not None:
            out["write"] = self.model.write_per_second
        if (d := self.difference) is not None:
            out |= {"ppl_increase": d.perplexity_increase, "kl": d.kl, "kl_p99": d.kl_p99, "kl_max": d.kl_max}
            out |= {"top1": d.top1, "top5": d.top5}
            if d.sqnr:
                out |= {"sqnr_min": min(d.sqnr.values()), "sqnr_last": list(d.sqnr.values())[-1]}
        return out

    def as_json(self) -> object:
        """For machines. JSON has no infinity: null is an SQNR where nothing differs, or an overflow."""
        return _finite({"metrics": self.metrics(), **asdict(self)})


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
