"""What a port did: one row per module, totals, and how to start an engine on the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transload.engines import ENGINES, Engine, Layer
from transload.formats.base import Format
from transload.formats.limits import listed
from transload.porting.plan import Output, PortPlan
from transload.porting.precision import Execution
from transload.quant import QuantSpec
from transload.requantize import Difference


@dataclass(frozen=True, slots=True)
class Moved:
    """One quantized module of the source. source and target are schemes in words; difference None means exact."""

    name: str
    source: str
    target: str
    action: str  # repack, dequantize or requantize
    difference: Difference | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """Whether an engine runs the result: the command that starts it, or why it does not."""

    engine: str
    command: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class PortReport:
    """The answer of `port`. Bytes are of tensors; carried counts float tensors and buffers.

    executed: for an engine as the target, the precision that it really runs in.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    modules: tuple[Moved, ...]
    carried: int
    files: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    engines: tuple[EngineAnswer, ...]
    notes: tuple[str, ...]
    executed: tuple[Execution, ...] = ()

    @property
    def exact(self) -> bool:
        """True when every number of the source is in the target."""
        return all(m.difference is None for m in self.modules)

    def to_json(self) -> dict[str, object]:
        """Plain types for `json.dumps`; an exact module has difference null."""
        return asdict(self) | {"exact": self.exact}

    def __str__(self) -> str:
        changed = [m for m in self.modules if m.difference is not None]
        worst = min(changed, key=lambda m: m.difference.sqnr_db if m.difference else 0.0, default=None)
        what = "all exact" if worst is None else f"{len(changed)} changed, worst {worst.name}: {worst.difference}"
        return (
            f"{self.source} ({self.source_format}) -> {self.target} ({self.target_format}): {len(self.modules)} "
            f"quantized modules, {what}; {self.carried} float tensors carried; {self.bytes_before} -> "
            f"{self.bytes_after} bytes in {self.seconds:.1f} s"
        )


def words(output: Output) -> str:
    """A target's scheme, or the dtype of a float tensor."""
    if output.spec is not None:
        return str(output.spec)
    return ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in output.tensors.values())


def engine_answers(plan: PortPlan, path: Path) -> tuple[EngineAnswer, ...]:
    """Every engine that knows the format, with its command, or the first module that it does not run."""
    names = {name for o in plan.outputs() for name in o.tensors}
    quantized = [(o.name, o.spec, f"{o.name}.bias" in names) for o in plan.outputs() if o.spec is not None]
    return tuple(_answer(engine, plan.format, quantized, path) for engine in ENGINES)


def _answer(
    engine: Engine, format: Format, quantized: Sequence[tuple[str, QuantSpec, bool]], path: Path
) -> EngineAnswer:
    loaded = list(dict.fromkeys(rule.format for rule in engine.rules))
    # Plain floats in safetensors are every vLLM's own format, and need no flag.
    plain = not quantized and format.container == "safetensors" and engine.name.startswith("vllm")
    if format.name not in loaded and not plain:
        return EngineAnswer(engine.label, None, f"loads {listed(loaded)}, not {format.name}")
    for name, spec, bias in quantized:
        covered = engine.covers(format.name, Layer(spec, experts=".experts." in name, bias=bias))
        if isinstance(covered, str):
            return EngineAnswer(engine.label, None, f"{name} ({spec}): {covered}")
    # The flag of vllm-ascend names msModelSlim's description; other formats are found in config.json.
    command = engine.command if format.name == "msmodelslim" else engine.command.partition(" --quantization")[0]
    return EngineAnswer(engine.label, command.format(path=path), None)
