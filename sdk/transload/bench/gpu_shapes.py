"""What the GPU benchmark multiplies: layers of real models, as (N, K), and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transload.bench.cases import parse_shape

TOP_K = 8  # experts that a token visits in the models below, and by default


@dataclass(frozen=True, slots=True)
class Shape:
    """One linear layer [N, K], or a stack of experts of which each token visits top_k. group: of the weight."""

    name: str
    n: int
    k: int
    experts: int = 0
    top_k: int = 0
    group: int = 128

    @property
    def weights(self) -> int:
        """Numbers in the weight."""
        return self.n * self.k * max(1, self.experts)


SHAPES = (
    Shape("Qwen2.5-7B qkv", 4608, 3584),
    Shape("Qwen2.5-7B o", 3584, 3584),
    Shape("Qwen2.5-7B gate_up", 37888, 3584),
    Shape("Qwen2.5-7B down", 3584, 18944),
    Shape("Qwen2.5-72B qkv", 10240, 8192),
    Shape("Qwen2.5-72B o", 8192, 8192),
    Shape("Qwen2.5-72B gate_up", 59136, 8192),
    Shape("Qwen2.5-72B down", 8192, 29568),
    Shape("Qwen3-30B-A3B experts gate_up", 1536, 2048, 128, TOP_K),
    Shape("Qwen3-30B-A3B experts down", 2048, 768, 128, TOP_K),
    Shape("GLM-5 experts gate_up", 4096, 6144, 256, TOP_K),
    Shape("GLM-5 experts down", 6144, 2048, 256, TOP_K),
)
ROWS = (1, 4, 16, 64, 256, 512, 1024, 4096)
TOKENS = (1, 4, 16, 64, 256)  # for experts

# For a dry run: two layers and few rows, so that a processor is done in seconds.
TINY = (Shape("tiny", 64, 256), Shape("tiny experts", 32, 128, 4, 2))
TINY_ROWS = (1, 17)


def shapes(asked: Sequence[str], groups: Sequence[int]) -> tuple[Shape, ...]:
    """The shapes of a command line, "NxK" or "EXPERTSxNxK", in every group size. Raises ConfigError.

    >>> shapes(["8x1536x4096"], [128])
    (Shape(name='8x1536x4096', n=1536, k=4096, experts=8, top_k=8, group=128),)
    """
    found = []
    for text in asked:
        *experts, n, k = parse_shape(text)
        for group in groups:
            top_k = min(TOP_K, experts[0]) if experts else 0
            found.append(Shape(text, n, k, experts[0] if experts else 0, top_k, group))
    return tuple(found)
