"""What a quantize did: one row a module, the fallbacks, and the report of the port that wrote the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from transload.porting import PortReport
from transload.quantize.layerwise import Made


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """The answer of `quantize`. text: what it was calibrated with. seconds: of the quantization, without the port."""

    recipe: str
    text: str
    modules: tuple[Made, ...]
    notes: tuple[str, ...]
    port: PortReport
    seconds: float

    @property
    def fallbacks(self) -> tuple[Made, ...]:
        """Modules that the recipe's method did not quantize, each with its reason."""
        return tuple(m for m in self.modules if m.note)

    def to_json(self) -> dict[str, object]:
        """Plain types for `json.dumps`; infinite SQNRs are null."""
        value = asdict(self) | {"port": self.port.to_json()}
        value["modules"] = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(m).items()}
            for m in self.modules
        ]
        return value

    def __str__(self) -> str:
        worst = min(self.modules, key=lambda m: m.weight_sqnr)
        return (
            f"{self.port.source} -> {self.port.target} ({self.port.target_format}) by recipe {self.recipe}: "
            f"{len(self.modules)} modules quantized in {self.seconds:.0f} s, {len(self.fallbacks)} with a note; worst "
            f"weight {worst.name}: {worst.weight_sqnr:.1f} dB; {self.port.bytes_after} bytes"
        )


def left_notes(left: Mapping[str, str], floats: str) -> Iterator[str]:
    """What became of quantized modules that the recipe leaves and the target does not take, by reason."""
    for reason in dict.fromkeys(left.values()):
        names = [name for name, why in left.items() if why == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}, quantized in the source and left by the recipe, became {floats}: {reason}"


def median(values: Sequence[float]) -> float:
    """The middle value; NaN of none."""
    return sorted(values)[len(values) // 2] if values else math.nan
