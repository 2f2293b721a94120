"""Where a port goes: a format by name, or an engine, which means the format that it loads and the limits that it has.

compressed-tensors   msmodelslim   fp32         a format: whatever it can hold
vllm   vllm-cpu   vllm-ascend==0.23             an engine, with its release where that matters
"""

from __future__ import annotations

from dataclasses import dataclass

from transload.engines import ENGINES, Engine, Layer
from transload.errors import ConfigError
from transload.formats import FORMATS, find_format
from transload.formats.base import Format
from transload.quant import QuantSpec

# Of the formats that an engine loads, the one that holds most.
_PREFERRED = ("msmodelslim", "compressed-tensors", "gguf")


@dataclass(frozen=True, slots=True)
class Target:
    """A format, and the engine whose limits count too."""

    name: str
    format: Format
    engine: Engine | None = None

    @property
    def fuses(self) -> bool:
        """True when an engine will stack q, k and v of this format, so that they must share a scheme."""
        return self.engine is not None and self.format.container == "safetensors"

    def refuses(self, module: str, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """None when the module can be written, and run by the engine where there is one; else the reason."""
        reason = self.format.cannot_hold(spec, shape)
        if reason is not None or self.engine is None:
            return reason
        covered = self.engine.covers(self.format.name, Layer(spec, experts=".experts." in module))
        return f"{self.engine.label} runs {covered}" if isinstance(covered, str) else None


def find_target(name: str) -> Target:
    """The target of a name: a format, else an engine, with ==release where there are several.

    Raises ConfigError listing the names.
    """
    engine, _, release = name.partition("==")
    found = [e for e in ENGINES if e.name == engine and release in ("", e.version)]
    if found:
        return Target(name, _format_of(found[0]), found[0])
    try:
        return Target(name, find_format(name))
    except ConfigError as e:
        engines = ", ".join(f"{e.name}=={e.version}" for e in ENGINES)
        raise ConfigError(f"{e}; and engines: {engines}") from e


def _format_of(engine: Engine) -> Format:
    loaded = {rule.format for rule in engine.rules}
    name = next((f for f in _PREFERRED if f in loaded), sorted(loaded)[0])
    return next((f for f in FORMATS if f.name == name), None) or find_format(name)
