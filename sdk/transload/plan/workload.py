"""The workload: how long, how many, how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from transload.errors import ConfigError
from transload.plan.units import Tokens
from transload.plan.yamlfile import read_yaml

Objective = Literal["throughput", "latency", "tokens", "fewest"]


class Workload(BaseModel):
    """What the deployment must serve.

    context: the longest sequence; one of this length must fit, as the engine demands at start.
    concurrency: sequences that run at once (the engine's max-num-seqs). prompt and output: a typical request; when
    given, `concurrency` of them must fit together. hold_all: `concurrency` sequences of full context must fit together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: Tokens = Field(default=8192, ge=1, le=1 << 27)
    concurrency: int = Field(default=16, ge=1, le=1_000_000)
    prompt: Tokens | None = Field(default=None, ge=1)
    output: Tokens | None = Field(default=None, ge=1)
    hold_all: bool = False
    kv_dtype: Literal["bf16", "fp8", "int8"] = "bf16"
    batched_tokens: Tokens | None = Field(default=None, ge=1, le=1 << 24, description="engine's max-num-batched-tokens")
    speculative_tokens: int = Field(default=0, ge=0, le=64, description="MTP or draft tokens a step; 0 = off")
    prefix_caching: bool = True
    vision: bool = Field(default=True, description="load the vision tower of a multimodal model")
    objective: Objective = "throughput"

    @model_validator(mode="after")
    def _check(self) -> Workload:
        if self.typical_tokens > self.context:
            raise ValueError(f"prompt + output is {self.typical_tokens} tokens, longer than the context {self.context}")
        return self

    @property
    def typical_tokens(self) -> int:
        """Tokens of a typical request, 0 when none was described."""
        return (self.prompt or 0) + (self.output or 0)

    @property
    def average_tokens(self) -> int:
        """Tokens of a request for speed estimates: the typical one, else a quarter of the context."""
        return self.typical_tokens or max(1, self.context // 4)


def read_workload(path: str | Path) -> dict[str, object]:
    """The fields of a workload file (YAML), not yet checked. Raises ConfigError when it is no mapping."""
    data = read_yaml(Path(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping such as 'context: 32k', found {type(data).__name__}")
    return {str(name): value for name, value in data.items()}
