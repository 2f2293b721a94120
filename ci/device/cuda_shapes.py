"""What the CUDA benchmark multiplies: layers of real models, as (N, K), and rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One linear layer, or a stack of experts of which each row visits top_k."""

    model: str
    layer: str
    n: int
    k: int
    experts: int = 0
    top_k: int = 0

    @property
    def name(self) -> str:
        return f"{self.model} {self.layer}"

    @property
    def weights(self) -> int:
        return self.n * self.k * max(1, self.experts)


DENSE = (
    Shape("Qwen2.5-7B", "qkv", 4608, 3584),
    Shape("Qwen2.5-7B", "o", 3584, 3584),
    Shape("Qwen2.5-7B", "gate_up", 37888, 3584),
    Shape("Qwen2.5-7B", "down", 3584, 18944),
    Shape("Qwen2.5-72B", "qkv", 10240, 8192),
    Shape("Qwen2.5-72B", "o", 8192, 8192),
    Shape("Qwen2.5-72B", "gate_up", 59136, 8192),
    Shape("Qwen2.5-72B", "down", 8192, 29568),
)
EXPERTS = (
    Shape("Qwen3-30B-A3B", "experts gate_up", 1536, 2048, 128, 8),
    Shape("Qwen3-30B-A3B", "experts down", 2048, 768, 128, 8),
    Shape("GLM-5", "experts gate_up", 4096, 6144, 256, 8),
    Shape("GLM-5", "experts down", 6144, 2048, 256, 8),
)
ROWS = (1, 4, 16, 64, 256, 512, 1024, 4096)
TOKENS = (1, 16, 64, 256)  # for experts

TINY_DENSE = (Shape("tiny", "dense", 64, 256),)
TINY_EXPERTS = (Shape("tiny", "experts", 32, 128, 4, 2),)
TINY_ROWS = (1, 17)
