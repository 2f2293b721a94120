"""A short value that two weights share exactly when their numbers do, so that comparing needs no second copy."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from transload.quant import QTensor


def fingerprint(value: QTensor | Tensor) -> bytes:
    """16 bytes over codes, scales, zeros, mins and g_idx with their shapes and dtypes, or over a float tensor.

    The group size is left out: a group as long as the row and one scale per channel are the same numbers.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(value, Tensor):
        _update(digest, value)
        return digest.digest()
    digest.update(f"{value.spec.bits} {value.spec.grid.value} {value.spec.zero.value}".encode())
    for part in (value.codes, value.scales, value.zeros, value.mins, value.g_idx):
        if part is None:
            digest.update(b"none")
        else:
            _update(digest, part)
    return digest.digest()


def _update(digest: hashlib.blake2b, t: Tensor) -> None:
    digest.update(f"{t.dtype} {tuple(t.shape)}".encode())
    if t.numel():
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
