"""Tensor headers without weights and without torch: names, dtypes, shapes and byte ranges of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one stored tensor lies. dtype is safetensors' spelling (BF16, F8_E4M3, I32) or a GGUF type (Q4_K).

    shape is in torch's order (out features first), also for GGUF. start and end are byte offsets in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start
