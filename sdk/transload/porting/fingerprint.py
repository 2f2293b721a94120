"""Short values that two tensors share when their bytes do, so that comparing needs no second copy in memory."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from transload.errors import FormatError
from transload.headers import TensorInfo

_CHUNK = 8 << 20


def fingerprint(tensor: Tensor) -> bytes:
    """128 bits of XXH3 over a tensor's bytes. It guards against accidents, not against forgers, at memory's speed."""
    if not tensor.numel():
        return xxhash.xxh3_128().digest()
    return xxhash.xxh3_128(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def stored_fingerprint(info: TensorInfo) -> bytes:
    """The same over a tensor as it lies in its file, read piece by piece. Raises FormatError when it cannot be read."""
    digest, left = xxhash.xxh3_128(), info.nbytes
    buffer = bytearray(min(_CHUNK, left))
    try:
        with info.file.open("rb", buffering=0) as f:
            f.seek(info.start)
            while left:
                count = f.readinto(memoryview(buffer)[: min(len(buffer), left)])
                if not count:
                    break
                digest.update(memoryview(buffer)[:count])
                left -= count
    except OSError as e:
        raise FormatError(f"{info.file}: {info.name} cannot be read back: {e.strerror or e}") from e
    if left:
        raise FormatError(f"{info.file}: {info.name} read back is {left} bytes short")
    return digest.digest()
