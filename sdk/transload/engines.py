"""What engines load: for one quantized layer in one format, whether an engine runs it, and in which precision.

Data, one row a rule, read from the engines' own sources and checked by running them where that is possible here
(docs/engines.md). Transload's own runtime is not in this list: its kernels answer for themselves (`hal.choose`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transload.quant import PER_CHANNEL, Grid, QuantSpec, Zero

ANY: frozenset[int] = frozenset()
_MARLIN_GROUPS = frozenset({PER_CHANNEL, 32, 64, 128})


@dataclass(frozen=True, slots=True)
class Layer:
    """What a rule looks at: one quantized layer as it lies in a checkpoint."""

    spec: QuantSpec
    experts: bool = False  # a routed expert of a mixture of experts


@dataclass(frozen=True, slots=True)
class Rule:
    """A format that an engine loads, with the limits it has. executed is the scheme that really runs."""

    format: str
    bits: frozenset[int]
    groups: frozenset[int]  # ANY: every size
    zeros: frozenset[Zero]
    executed: str
    act: str = "none"  # "none", "token" (dynamic int8 per token), "static"
    grid: Grid = Grid.INT
    experts: bool | None = None  # None: dense layers and experts
    note: str = ""

    def objections(self, layer: Layer) -> list[str]:
        """Every reason why the rule does not cover a layer, empty when it does."""
        spec, act = layer.spec, _act(layer.spec)
        checks = (
            (self.experts in (None, layer.experts), "experts only" if self.experts else "dense layers only"),
            (spec.grid is self.grid, f"codes are {self.grid.value}, not {spec.grid.value}"),
            (act == self.act, f"activations {_ACT[self.act]}, not {_ACT.get(act, act)}"),
            (spec.bits in self.bits, f"{_list(self.bits)} bits, not {spec.bits}"),
            (
                not self.groups or spec.group_size in self.groups,
                f"group size {_list(self.groups)}, not {spec.group_size}",
            ),
            (spec.zero in self.zeros, f"{_list(z.value for z in self.zeros)} zero points, not {spec.zero.value}"),
            (not spec.act_order, "no act-order (g_idx)"),
        )
        return [reason for good, reason in checks if not good]


@dataclass(frozen=True, slots=True)
class Engine:
    """One release of an engine on one vendor's hardware."""

    name: str
    version: str
    hardware: str
    rules: tuple[Rule, ...]
    command: str  # how to start it, {path} is the checkpoint

    @property
    def label(self) -> str:
        """Name, version and hardware in one short word for tables."""
        return f"{self.name} {self.version} ({self.hardware})"

    def covers(self, format: str, layer: Layer) -> Rule | str:
        """The rule that runs a layer, or why none does, a sentence."""
        rules = [r for r in self.rules if r.format == format]
        if not rules:
            formats = _list(dict.fromkeys(r.format for r in self.rules))
            return f"loads {formats}, not {format}"
        objections = [rule.objections(layer) for rule in rules]
        fewest = min(len(found) for found in objections)
        if fewest == 0:
            return rules[objections.index([])]
        nearest = [", ".join(found) for found in objections if len(found) == fewest]
        return "; or ".join(dict.fromkeys(nearest))


_SYM, _ASYM = frozenset({Zero.MIDPOINT}), frozenset({Zero.CODES})
_NONE = frozenset({Zero.NONE})
_W4, _W8, _W48 = frozenset({4}), frozenset({8}), frozenset({4, 8})
_CHANNEL = frozenset({PER_CHANNEL})
_SERVE = "vllm serve {path}"

VLLM_CUDA = Engine(
    "vllm",
    "0.32",
    "CUDA",
    (
        Rule("gptq", _W48, _MARLIN_GROUPS, _SYM, "W{bits}A16"),
        Rule("awq", _W4, _MARLIN_GROUPS, _ASYM, "W4A16"),
        Rule("compressed-tensors", _W4, _MARLIN_GROUPS | {256}, _SYM | _ASYM, "W4A16"),
        Rule("compressed-tensors", _W8, _MARLIN_GROUPS, _SYM, "W8A16"),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", act="token"),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", act="static"),
        Rule("fp8", _W8, frozenset({128}), _NONE, "W8A8 fp8", grid=Grid.E4M3),
    ),
    _SERVE,
)

VLLM_CPU = Engine(
    "vllm-cpu",
    "0.32",
    "CPU",
    (
        Rule("gptq", _W4, _MARLIN_GROUPS, _SYM, "W4A8", note="VLLM_CPU_INT4_W4A8=0 runs it as W4A16 on AMX hosts"),
        Rule("awq", _W4, _MARLIN_GROUPS, _ASYM, "W4A8", note="VLLM_CPU_INT4_W4A8=0 runs it as W4A16 on AMX hosts"),
        Rule(
            "compressed-tensors",
            _W4,
            _MARLIN_GROUPS,
            _SYM | _ASYM,
            "W4A8",
            experts=False,
            note="VLLM_CPU_INT4_W4A8=0 runs it as W4A16 on AMX hosts",
        ),
        Rule("compressed-tensors", _W4, frozenset({PER_CHANNEL, 64, 128}), _SYM, "W4A16", experts=True),
        Rule("compressed-tensors", _W4, _MARLIN_GROUPS, _SYM, "W4A8", act="token", experts=False),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", act="token"),
    ),
    _SERVE,
)

VLLM_ASCEND_023 = Engine(
    "vllm-ascend",
    "0.23",
    "Ascend",
    (
        Rule("msmodelslim", _W8, _CHANNEL, _SYM, "W8A8", act="token"),
        Rule("msmodelslim", _W8, _CHANNEL, _SYM, "W8A8", act="static", experts=False),
        Rule("msmodelslim", _W4, _CHANNEL, _SYM, "W4A8", act="token", experts=True),
        Rule(
            "msmodelslim",
            _W4,
            frozenset({64, 128}),
            _SYM,
            "W4A16",
            act="token",
            experts=False,
            note="the dense W4A8 class multiplies 16-bit activations",
        ),
        Rule(
            "msmodelslim",
            _W4,
            frozenset({256}),
            _SYM,
            "W4A16",
            act="token",
            experts=False,
            note="dense groups of 256 run as W4A16 and need VLLM_ASCEND_ENABLE_NZ=0: the NZ layout refuses them",
        ),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", act="token"),
        Rule("compressed-tensors", _W4, frozenset({32, 64, 128}), _SYM, "W4A16", experts=True),
        Rule("compressed-tensors", _W4, _CHANNEL, _SYM, "W4A8", act="token", experts=True),
    ),
    "vllm serve {path} --quantization ascend",
)

VLLM_ASCEND_MAIN = Engine(
    "vllm-ascend",
    "main",
    "Ascend",
    (
        Rule("msmodelslim", _W8, _CHANNEL, _SYM, "W8A8", act="token"),
        Rule("msmodelslim", _W8, _CHANNEL, _SYM, "W8A8", act="static", experts=False),
        Rule("msmodelslim", _W4, _CHANNEL, _SYM, "W4A8", act="token", experts=True),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", act="token"),
        Rule("compressed-tensors", _W4, frozenset({32, 64, 128}), _SYM, "W4A16", experts=True),
        Rule("compressed-tensors", _W4, _CHANNEL, _SYM, "W4A8", act="token", experts=True),
    ),
    "vllm serve {path} --quantization ascend",
)

LLAMA_CPP = Engine(
    "llama.cpp",
    "2026-11",
    "CPU/GPU",
    (
        Rule("gguf", frozenset({4, 5, 8}), frozenset({32}), _SYM, "W{bits}A8"),
        Rule("gguf", frozenset({4, 5}), frozenset({32}), frozenset({Zero.MINS}), "W{bits}A8"),
        Rule("gguf", frozenset({6}), frozenset({16}), _SYM, "W6A8"),
    ),
    "llama-server -m {path}",
)

ENGINES = (VLLM_CUDA, VLLM_CPU, VLLM_ASCEND_023, VLLM_ASCEND_MAIN, LLAMA_CPP)

_ACT = {"none": "of 16 bits", "token": "int8 per token", "static": "static int8"}


def _act(spec: QuantSpec) -> str:
    if spec.act is None:
        return "none"
    if spec.act.static:
        return "static"
    return "token" if spec.act.group_size == PER_CHANNEL else f"int8 per token and {spec.act.group_size}"


def _list(items: Iterable[int | str]) -> str:
    ordered = sorted(items, key=str) if isinstance(items, frozenset) else items
    return " or ".join("channel" if item == PER_CHANNEL else str(item) for item in ordered)
