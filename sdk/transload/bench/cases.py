"""What the matmul benchmark multiplies: shapes of real decoder layers, row counts from decoding to prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.quant import ActSpec, QTensor, QuantSpec, stack_experts
from transload.reference import quantize_rtn

# (N, K) of a small model's attention and MLP, of 7-billion-parameter layers, and one expert layer.
SHAPES = ((896, 896), (4864, 896), (4096, 4096), (11008, 4096), (4096, 14336))
EXPERTS = (8, 1536, 4096)
ROWS = (1, 4, 16, 64, 256, 1024)
GROUPS = (128, 32)
SCHEMES = ("w4a8", "w4a16")


@dataclass(frozen=True, slots=True)
class MatmulCase:
    """One cell: y[m, n] = x[m, k] @ w[n, k].T, weights of 4 bits in groups; m rows spread evenly over experts."""

    n: int
    k: int
    m: int
    group: int
    scheme: str
    experts: int | None = None

    @property
    def spec(self) -> QuantSpec:
        """Symmetric 4-bit codes with float16 scales; W4A8 quantizes activations per token and weight group."""
        act = ActSpec(8, self.group) if self.scheme == "w4a8" else None
        return QuantSpec(4, self.group, scale_dtype=torch.float16, act=act)

    @property
    def x_dtype(self) -> torch.dtype:
        """What the kernels are given: float32 to be quantized for W4A8, bfloat16 for W4A16."""
        return torch.float32 if self.scheme == "w4a8" else torch.bfloat16

    @property
    def operations(self) -> int:
        """Multiplications and additions of the case."""
        return 2 * self.m * self.n * self.k

    @property
    def label(self) -> str:
        """The case in words, as the tables show it."""
        experts = f"{self.experts} experts of " if self.experts else ""
        return f"{experts}N={self.n} K={self.k} g{self.group} {self.scheme}"


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The data of a case: weight, x [M, K] in the case's x_dtype, counts int64 [E] with experts."""

    weight: QTensor
    x: Tensor
    counts: Tensor | None

    @property
    def used(self) -> float:
        """The fraction of the weight that is read: experts without rows are not."""
        return 1.0 if self.counts is None else float((self.counts > 0).float().mean())

    def truth(self, rows: int) -> Tensor:
        """The first rows of the product in float64, from the dequantized weight and unquantized x."""
        if self.counts is None:
            return self.x[:rows].double() @ self.weight.dequantize().double().T
        expert = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)[:rows]
        used = {int(e): self.weight.expert(int(e)).dequantize().double() for e in set(expert.tolist())}
        return torch.stack([used[int(e)] @ row.double() for e, row in zip(expert, self.x, strict=False)])


def cases(
    shapes: Sequence[tuple[int, ...]], rows: Sequence[int], groups: Sequence[int], schemes: Sequence[str]
) -> Iterator[MatmulCase]:
    """Every combination; a shape is (N, K) or (experts, N, K). Raises ConfigError for an unknown scheme."""
    for shape, group, scheme, m in product(shapes, groups, schemes, rows):
        if scheme not in SCHEMES:
            raise ConfigError(f"scheme '{scheme}': give one of {', '.join(SCHEMES)}")
        *experts, n, k = shape
        yield MatmulCase(n, k, m, group, scheme, experts[0] if experts else None)


def weight_of(case: MatmulCase) -> QTensor:
    """A gaussian weight, rounded to 4 bits: the same for every row count."""
    random = torch.Generator().manual_seed(case.n * 31 + case.k)

    def one() -> QTensor:
        return quantize_rtn(torch.randn(case.n, case.k, generator=random) * case.k**-0.5, case.spec)

    return one() if case.experts is None else stack_experts([one() for _ in range(case.experts)])


def operands(case: MatmulCase, weight: QTensor) -> Operands:
    """Gaussian activations for a weight."""
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(case.m)).to(case.x_dtype)
    if case.experts is None:
        return Operands(weight, x, None)
    each, rest = divmod(case.m, case.experts)
    return Operands(weight, x, torch.tensor([each + (e < rest) for e in range(case.experts)]))


def parse_shape(text: str) -> tuple[int, ...]:
    """(N, K) of "4096x4096", (E, N, K) of "8x1536x4096". Raises ConfigError for anything else."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(f"shape '{text}': give NxK, or EXPERTSxNxK")
    return tuple(int(p) for p in parts)
