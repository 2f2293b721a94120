"""Limits for pipelines: "kl>0.05" fails a run whose KL divergence is above 0.05."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transload.errors import ConfigError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
METRICS = {
    "ppl": "perplexity of the model",
    "ppl_increase": "relative increase over the source, 0.02 = 2 %",
    "kl": "mean KL divergence in nats per token",
    "kl_p99": "KL divergence that one token in a hundred exceeds",
    "kl_max": "KL divergence of the worst token",
    "top1": "share of tokens with the same likeliest token",
    "top5": "mean overlap of the five likeliest tokens",
    "sqnr_min": "SQNR of the worst layer output, dB",
    "sqnr_last": "SQNR of the last hidden state, dB",
    "read": "tokens read per second",
    "write": "tokens generated per second",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """The run fails when `metric` compares like this to `value`."""

    metric: str
    comparison: str
    value: float

    def broken_by(self, metrics: Mapping[str, float]) -> str | None:
        """None, or what was found. A number that is not there, or not a number, breaks every limit."""
        found = metrics.get(self.metric, math.nan)
        if math.isnan(found):
            return f"{self.metric} was not measured"
        broken = _OPERATORS[self.comparison](found, self.value)
        return (
            f"{self.metric} is {found:.6g}, and {self.metric}{self.comparison}{self.value:g} fails" if broken else None
        )


def parse_limits(texts: Sequence[str], against: bool) -> list[Limit]:
    """Limits as people write them. against: whether there is a source to compare with.

    Raises ConfigError for unknown metrics, and for metrics that need a source where there is none.

    >>> parse_limits(["kl > 0.05"], against=True)
    [Limit(metric='kl', comparison='>', value=0.05)]
    """
    limits = [_parse(text) for text in texts]
    alone = {"ppl", "read", "write"}
    for limit in limits:
        if not against and limit.metric not in alone:
            raise ConfigError(f"the limit on '{limit.metric}' needs a source to compare with: give --against")
    return limits


def _parse(text: str) -> Limit:
    match = re.fullmatch(r"\s*([a-z0-9_]+)\s*(>=|<=|>|<)\s*([-+.0-9eE]+)\s*(%?)\s*", text)
    number = _number(match[3]) if match else None
    if match is None or number is None:
        raise ConfigError(f"'{text}' is no limit: write a metric, a comparison and a number, such as 'kl>0.05'")
    if match[1] not in METRICS:
        raise ConfigError(f"'{match[1]}' is no metric; there are {', '.join(METRICS)}")
    return Limit(match[1], match[2], number / 100 if match[4] else number)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
