"""The hidden states between two layers, for all calibration windows: a file that is mapped, so that RAM is optional."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from transload.errors import FormatError


class Hidden:
    """float32 [count, tokens, width] in a file."""

    def __init__(self, file: Path, count: int, tokens: int, width: int, create: bool) -> None:
        self.file, self.count, self.tokens, self.width = file, count, tokens, width
        size = 4 * count * tokens * width
        if create:
            with file.open("wb") as f:
                f.truncate(size)
        elif not file.is_file() or file.stat().st_size != size:
            raise FormatError(f"{file}: is missing or not {size} bytes long; delete its folder and start again")
        mapped = torch.from_file(str(file), shared=True, size=count * tokens * width, dtype=torch.float32)
        self._states = mapped.view(count, tokens, width)

    def batches(self, tokens: int) -> Iterator[slice]:
        """Runs of windows of about that many tokens together."""
        step = max(1, tokens // self.tokens)
        for start in range(0, self.count, step):
            yield slice(start, min(start + step, self.count))

    def __getitem__(self, at: slice) -> Tensor:
        return self._states[at].clone()

    def __setitem__(self, at: slice, value: Tensor) -> None:
        self._states[at] = value

    def delete(self) -> None:
        """Removes the file. Its memory goes with the last reference."""
        self.file.unlink(missing_ok=True)
