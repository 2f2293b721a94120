"""Hadamard matrices of the sizes that models have: orthogonal, entries +-1, made from primes and doubling.

Sylvester: H(2n) = [[H, H], [H, -H]]. Paley I: order q + 1 for a prime q = 3 mod 4. Paley II: order 2(q + 1) for a prime
q = 1 mod 4. 896 = 28 * 32 and 28 = 2 * (13 + 1); 5120 = 20 * 256 and 20 = 19 + 1. A size that has none here is cut into
equal blocks that have one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transload.errors import ConfigError

_LARGEST_BASE = 512


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix, float64 [n, n] of +-1, or None when this file makes none of that order."""
    factors = _factors(n)
    return None if factors is None else torch.kron(*factors)


def block_size(n: int) -> int:
    """The largest divisor of n that is the order of a Hadamard matrix made here; at least 1."""
    return next(d for d in range(n, 0, -1) if n % d == 0 and _exists(d))


class Turn:
    """A random orthogonal matrix R [n, n]: signs, then Hadamard blocks of the largest size that n allows.

    It is never written out: a block is the Kronecker product of two small matrices, so turning a vector costs the sum
    of their sizes per number instead of n. Raises ConfigError for a size that would turn nothing.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.size, self.block = n, block_size(n)
        if self.block < 4:
            raise ConfigError(f"{n} features cannot be rotated: no Hadamard matrix of 4 or more divides it")
        factors = _factors(self.block)
        assert factors is not None
        self._doubled, self._base = (f / math.sqrt(len(f)) for f in factors)
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int64).double() * 2 - 1

    def rows(self, x: Tensor) -> Tensor:
        """x R for rows [..., n], computed in float64, returned as float32."""
        blocks = (x.double() * self._signs).reshape(-1, len(self._doubled), len(self._base))
        return (self._doubled.T @ blocks @ self._base).reshape(x.shape).float()

    def back(self, x: Tensor) -> Tensor:
        """x R^T: the reverse of `rows`."""
        blocks = x.double().reshape(-1, len(self._doubled), len(self._base))
        return ((self._doubled @ blocks @ self._base.T).reshape(x.shape) * self._signs).float()


def _factors(n: int) -> tuple[Tensor, Tensor] | None:
    """Sylvester's matrix of a power of two and a base matrix, whose Kronecker product has order n."""
    doubled = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    while n > 0:
        base = _base(n)
        if base is not None:
            return doubled, base
        if n % 2:
            return None
        n, doubled = n // 2, torch.kron(doubled, two)
    return None


def _exists(n: int) -> bool:
    while n % 2 == 0 and not _has_base(n):
        n //= 2
    return _has_base(n)


def _has_base(n: int) -> bool:
    return n in (1, 2) or (
        n % 4 == 0 and n <= _LARGEST_BASE and (_prime(n - 1) or ((n // 2 - 1) % 4 == 1 and _prime(n // 2 - 1)))
    )


def _base(n: int) -> Tensor | None:
    if not _has_base(n):
        return None
    if n <= 2:
        return torch.ones(1, 1, dtype=torch.float64) if n == 1 else torch.tensor([[1.0, 1], [1, -1]]).double()
    return _paley_one(n - 1) if _prime(n - 1) else _paley_two(n // 2 - 1)


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = 1, -1 or 0 as j - i is a square, no square or zero modulo q."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    return character[(index.unsqueeze(0) - index.unsqueeze(1)) % q]


def _bordered(q: int, corner: float) -> Tensor:
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, corner, _jacobsthal(q)
    return s


def _paley_one(q: int) -> Tensor:
    return torch.eye(q + 1, dtype=torch.float64) + _bordered(q, -1)


def _paley_two(q: int) -> Tensor:
    symmetric = _bordered(q, 1)
    plus = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(symmetric, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
