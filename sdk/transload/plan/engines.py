"""Inference engines as far as a plan depends on them: versions, defaults, block sizes and what they cannot load."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from transload.errors import ConfigError
from transload.models.info import Attention, ModelInfo


@dataclass(frozen=True, slots=True)
class Engine:
    """One release of an engine on one platform.

    utilization: the default --gpu-memory-utilization. block: tokens a KV block. dense_four_bits: why 4-bit linears
    outside routed experts are not loaded, or None. group_experts: why 4-bit experts in groups with int8 activations
    are not loaded, or None. async_steps: concurrent engine steps without a pipeline.
    """

    name: str
    version: str
    platform: str
    utilization: float
    block: int
    latent_block: int
    async_steps: int = 2
    dense_four_bits: str | None = None
    group_experts: str | None = None

    @property
    def label(self) -> str:
        """vllm==0.32."""
        return f"{self.name}=={self.version}"

    def block_for(self, info: ModelInfo) -> int:
        """Tokens in a KV block before hybrid models enlarge it."""
        return self.latent_block if Attention.MLA in info.attention else self.block

    def default_batched_tokens(self, memory: int) -> int:
        """The engine's max-num-batched-tokens on a device (vLLM 0.32, EngineArgs: 16384, 8192 or 2048)."""
        if self.platform == "cpu":
            return 4096
        return 16384 if memory >= 160 << 30 else 8192 if memory >= 70 << 30 else 2048


_NO_LINEAR = "no 4-bit linear outside routed experts"
# Sources: vLLM 0.32.0's own code; vllm-ascend 0.23.0 and main (register_scheme, quantization/methods).
ENGINES = (
    Engine("vllm", "0.32", "cuda", 0.92, 16, 64),
    Engine("vllm-ascend", "0.23", "ascend", 0.92, 128, 128, dense_four_bits=None, group_experts=None),
    Engine(
        "vllm-ascend",
        "main",
        "ascend",
        0.92,
        128,
        128,
        dense_four_bits=f"vllm-ascend main has {_NO_LINEAR}",
        group_experts="vllm-ascend main loads W4A8 experts per channel only",
    ),
    Engine("vllm-cpu", "0.32", "cpu", 0.92, 128, 16),
)


def engine_for(platform: str, wanted: str | None = None) -> Engine:
    """The engine that serves a platform: the newest known, or the one asked for as "name" or "name==version".

    "vllm" is understood on every platform as its build of vLLM. Raises ConfigError listing the engines that are known.
    """
    here = [e for e in ENGINES if e.platform == platform]
    if wanted is None:
        return here[0]
    name, _, version = wanted.partition("==")
    version = ".".join(version.split(".")[:2])
    for engine in here:
        if (engine.name == name or name == "vllm") and (
            not version or engine.version == version or name != engine.name
        ):
            return engine
    check_engine_name(wanted)
    return here[0]


def check_engine_name(wanted: str) -> None:
    """Raises ConfigError unless `wanted` names a known engine and version on some platform."""
    labels = [e.label for e in ENGINES]
    name, _, version = wanted.partition("==")
    short = ".".join(version.split(".")[:2])
    if not any(e.name == name and (not version or e.version == short) for e in ENGINES):
        near = difflib.get_close_matches(wanted, labels, 2, 0.3) or labels
        raise ConfigError(f"engine '{wanted[:60]}' is not known; nearest: {', '.join(near)}")
