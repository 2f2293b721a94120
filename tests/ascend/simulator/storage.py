"""What a device keeps beside a tensor's bytes: its storage format. CPU tensors have none, so it is remembered here.

The readers below are written from the documents with index arithmetic, on purpose in another way than
`transload_ascend.layouts`: when both agree, neither copied the other's mistake.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ND, FRACTAL_NZ = 2, 29


@dataclass(frozen=True)
class NzStorage:
    """A tensor whose bytes lie in FRACTAL_NZ order. Keeping the tensor keeps its address from being reused."""

    tensor: Tensor
    rows: int
    row_bytes: int


_NZ: dict[int, NzStorage] = {}


def format_of(t: Tensor) -> int:
    return FRACTAL_NZ if t.untyped_storage().data_ptr() in _NZ else ND


def cast_to_nz(data: Tensor) -> Tensor:
    """int8 [..., R, C] -> the same logical shape over bytes in block order (16 rows by 32 bytes)."""
    assert data.dtype == torch.int8
    rows, columns = data.shape[-2:]
    matrices = data.contiguous().numpy().reshape(-1, rows * columns)
    stored = np.empty_like(matrices)
    stored[:, _positions(rows, columns).reshape(-1)] = matrices
    out = torch.from_numpy(stored.reshape(data.shape))
    _NZ[out.untyped_storage().data_ptr()] = NzStorage(out, rows, columns)
    return out


def _positions(rows: int, columns: int) -> np.ndarray:
    """Where byte (r, c) lies: column block c // 32 outermost, then row block r // 16, then r % 16, then c % 32."""
    assert rows % 16 == 0, "the simulator keeps no padding"
    assert columns % 32 == 0, "the simulator keeps no padding"
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return ((c // 32) * (rows // 16) + r // 16) * (16 * 32) + (r % 16) * 32 + c % 32


def read_int8(weight: Tensor) -> Tensor:
    """An int8 weight in logical order, whatever its format."""
    nz = _NZ.get(weight.untyped_storage().data_ptr())
    return weight if nz is None else torch.from_numpy(_bytes_in_order(nz, weight))


def read_int4(weight: Tensor) -> Tensor:
    """The values of a packed weight as int8 [..., K, N]: int32 [..., K, N / 8] or the view [K / 8, N] of [N, K / 8]."""
    transposed = weight.stride(-1) != 1 and weight.stride(-2) == 1
    stored = weight.transpose(-1, -2) if transposed else weight
    nz = _NZ.get(weight.untyped_storage().data_ptr())
    words = stored.contiguous().numpy() if nz is None else _bytes_in_order(nz, stored).view(np.int32)
    nibbles = (words.astype(np.int64)[..., None] >> (4 * np.arange(8))) & 0xF
    values = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8).reshape(*words.shape[:-1], -1)
    result = torch.from_numpy(values)
    return result.transpose(-1, -2) if transposed else result


def _bytes_in_order(nz: NzStorage, weight: Tensor) -> np.ndarray:
    stored = nz.tensor.numpy().reshape(-1, nz.rows * nz.row_bytes)
    shape = (*weight.shape[:-2], nz.rows, nz.row_bytes)
    return np.ascontiguousarray(stored[:, _positions(nz.rows, nz.row_bytes).reshape(-1)]).reshape(shape)
