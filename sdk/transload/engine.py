"""What an engine's rule looks at and says: one quantized layer, whether it runs, and in which precision.

The rules themselves are data, in `engines`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, Grid, QuantSpec, Zero


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantized layer as it lies in a checkpoint. shape is (N, K) where it is known."""

    spec: QuantSpec
    experts: bool = False  # a routed expert of a mixture of experts
    bias: bool = False
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A format that an engine loads, with the limits it has. executed is the scheme that really runs.

    groups: empty means every size. archs: empty means every architecture of the engine. multiple: what N and K are
    multiples of. bias False: the engine drops a layer's bias. note: what a user should know, a sentence.
    """

    format: str
    bits: frozenset[int]
    groups: frozenset[int]
    zeros: frozenset[Zero]
    executed: str
    kernel: str = ""
    act: str = "none"  # "none", "token" (dynamic int8 per token), "block" (per token and group), "static"
    grid: Grid = Grid.INT
    experts: bool | None = None  # None: dense layers and experts
    archs: frozenset[str] = frozenset()
    bias: bool = True
    multiple: int = 1
    note: str = ""

    def objections(self, layer: Layer, arch: str | None = None) -> list[str]:
        """Every reason why the rule does not cover a layer, empty when it does. arch None stands for any."""
        spec, act = layer.spec, _act(layer.spec)
        shape = layer.shape or ()
        checks = (
            (self.experts in (None, layer.experts), "experts only" if self.experts else "dense layers only"),
            (spec.grid is self.grid, f"codes are {self.grid.value}, not {spec.grid.value}"),
            (act == self.act, f"activations {_ACT[self.act]}, not {_ACT.get(act, act)}"),
            (spec.bits in self.bits, f"{_list(self.bits)} bits, not {spec.bits}"),
            (
                not self.groups or spec.group_size in self.groups,
                f"group size {_list(self.groups)}, not {_list((spec.group_size,))}",
            ),
            (spec.zero in self.zeros, f"{_list(z.value for z in self.zeros)} zero points, not {spec.zero.value}"),
            (not spec.act_order, "no act-order (g_idx)"),
            (self.bias or not layer.bias, "layers without a bias, which it would drop"),
            (arch is None or not self.archs or arch in self.archs, f"on {_list(self.archs)}, not {arch}"),
            (
                not any(size % self.multiple for size in shape[-2:]),
                f"sizes that are multiples of {self.multiple}, not {' x '.join(map(str, shape))}",
            ),
        )
        return [reason for good, reason in checks if not good]

    def runs_as(self, spec: QuantSpec) -> str:
        """The scheme that really runs: W4A16, W8A8."""
        return self.executed.format(bits=spec.bits)


@dataclass(frozen=True, slots=True)
class Engine:
    """One release of an engine on one vendor's hardware.

    command: how to start it, {path} is the checkpoint. archs: the architectures that rules tell apart. mixed: schemes
    by role for a mixture of experts, what `requantize="auto"` means on this engine.
    """

    name: str
    version: str
    hardware: str
    rules: tuple[Rule, ...]
    command: str
    archs: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name, version and hardware in one short word for tables."""
        return f"{self.name} {self.version} ({self.hardware})"

    @property
    def target(self) -> str:
        """How a port names it: vllm-ascend==0.23."""
        return f"{self.name}=={self.version}"

    def checked_arch(self, arch: str | None) -> str | None:
        """The architecture in the spelling of the rules. Raises ConfigError listing those that there are."""
        if arch is None:
            return None
        plain = arch.lower().replace("sm_", "sm")
        if plain not in self.archs:
            known = f"it tells {', '.join(self.archs)} apart" if self.archs else "it tells none apart"
            raise ConfigError(f"architecture '{arch}' of {self.target}: {known}")
        return plain

    def covers(self, format: str, layer: Layer, arch: str | None = None) -> Rule | str:
        """The rule that runs a layer, or why none does, a sentence.

        Without an arch, rules for all architectures come first, then those for some.
        """
        static = layer.spec.act is not None and layer.spec.act.static
        rules = [r for r in self.rules if r.format == format and (static or r.act != "static")]
        if arch is None:
            rules.sort(key=lambda rule: bool(rule.archs))
        if not rules:
            formats = _list(dict.fromkeys(r.format for r in self.rules))
            return f"loads {formats}, not {format}"
        objections = [rule.objections(layer, arch) for rule in rules]
        fewest = min(len(found) for found in objections)
        if fewest == 0:
            return rules[objections.index([])]
        nearest = [", ".join(found) for found in objections if len(found) == fewest]
        return "; or ".join(dict.fromkeys(nearest))

    def kernels(self, format: str, layer: Layer, arch: str | None = None) -> str:
        """The kernels that run a layer, each with its architectures where they differ; empty where none is known."""
        rules = [r for r in self.rules if r.format == format and not r.objections(layer, arch)]
        if arch is not None or len(rules) < 2:
            return rules[0].kernel if rules else ""
        named = [f"{r.kernel} on {_list(r.archs)}" if r.archs else r.kernel for r in rules if r.kernel]
        return ", ".join(dict.fromkeys(named))


_ACT = {
    "none": "of 16 bits",
    "token": "int8 per token",
    "block": "int8 per token and group",
    "static": "static int8",
}


def _act(spec: QuantSpec) -> str:
    if spec.act is None:
        return "none"
    if spec.act.static:
        return "static"
    if spec.act.group_size == PER_CHANNEL:
        return "token"
    return "block" if spec.act.group_size == spec.group_size else f"int8 per token and {spec.act.group_size}"


def _list(items: Iterable[int | str]) -> str:
    ordered = sorted(items, key=str) if isinstance(items, frozenset) else items
    return " or ".join("channel" if item == PER_CHANNEL else str(item) for item in ordered)
