"""Where one stored tensor lies, and how names from foreign files are shown in messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr

_SHORT = Repr()  # never builds the text of a whole large value
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


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


def shown(value: object, limit: int = 120) -> str:
    """A value from a file, fit for a message: one printable line of at most `limit` characters and quotes."""
    text = value[: limit + 1] if isinstance(value, str) else _SHORT.repr(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return "'" + (text if len(text) <= limit else text[: limit - 3] + "...") + "'"
