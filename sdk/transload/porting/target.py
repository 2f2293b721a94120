"""Where a port goes: a format by name, or an engine, which means the format that it loads and the limits that it has.

compressed-tensors   msmodelslim   fp32         a format: whatever it can hold
vllm   vllm-cpu   vllm-ascend==0.23             an engine, with its release where that matters
"""

from __future__ import annotations

from dataclasses import dataclass

from transload.engines import ENGINES, Engine, Layer, Rule, find_engine
from transload.errors import ConfigError
from transload.formats import FORMATS, find_format
from transload.formats.base import Format
from transload.quant import QuantSpec

# Of the formats that an engine loads, the one that holds most comes first.
_PREFERRED = ("msmodelslim", "compressed-tensors", "gguf")


@dataclass(frozen=True, slots=True)
class Target:
    """A format, and the engine whose limits count too. arch: the hardware's architecture, None for any."""

    name: str
    format: Format
    engine: Engine | None = None
    arch: str | None = None

    @property
    def fuses(self) -> bool:
        """True when an engine will stack q, k and v of this format, so that they must share a scheme."""
        return self.engine is not None and self.format.container == "safetensors"

    @property
    def label(self) -> str:
        """The engine with its release, hardware and architecture; the name of a format."""
        if self.engine is None:
            return self.name
        return self.engine.label if self.arch is None else f"{self.engine.label} on {self.arch}"

    def layer(self, module: str, spec: QuantSpec, shape: tuple[int, ...], bias: bool = False) -> Layer:
        """What the engine's rules look at."""
        return Layer(spec, ".experts." in module, bias, shape)

    def rule(self, layer: Layer) -> Rule | str | None:
        """The engine's rule for a layer, or its refusal; None where the target is no engine."""
        return None if self.engine is None else self.engine.covers(self.format.name, layer, self.arch)

    def refuses(self, module: str, spec: QuantSpec, shape: tuple[int, ...], bias: bool = False) -> str | None:
        """None when the module can be written, and run by the engine where there is one; else the reason."""
        reason = self.format.cannot_hold(spec, shape)
        if reason is not None:
            return reason
        covered = self.rule(self.layer(module, spec, shape, bias))
        return f"{self.label} runs {covered}" if isinstance(covered, str) else None


def find_target(name: str, arch: str | None = None) -> Target:
    """The first of `find_targets`."""
    return find_targets(name, arch)[0]


def find_targets(name: str, arch: str | None = None) -> tuple[Target, ...]:
    """The targets of a name: one for a format, and for an engine one for each format that it loads, widest first.

    An engine may have ==release, and an arch of its hardware. Raises ConfigError listing the names.
    """
    engine = find_engine(name)
    if engine is not None:
        arch = engine.checked_arch(arch)
        return tuple(Target(name, format, engine, arch) for format in _formats_of(engine))
    if arch is not None:
        raise ConfigError(f"'{name}' is no engine: an architecture ({arch}) goes with one, for example vllm==0.32")
    try:
        return (Target(name, find_format(name)),)
    except ConfigError as e:
        raise ConfigError(f"{e}; and engines: {', '.join(e.target for e in ENGINES)}") from e


def _formats_of(engine: Engine) -> list[Format]:
    """The formats that an engine loads and that can be written, at least one."""
    loaded = dict.fromkeys(rule.format for rule in engine.rules)
    names = [*(f for f in _PREFERRED if f in loaded), *(f for f in loaded if f not in _PREFERRED)]
    known = [next((f for f in FORMATS if f.name == name), None) or find_format(name) for name in names]
    return [f for f in known if type(f).encode is not Format.encode] or known[:1]
