"""A position in a byte buffer that never leaves it: the primitive reads of a binary header."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

from transload.errors import FormatError

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(slots=True)
class Cursor:
    """Reads little-endian values from `data` at `position`; `where` begins every error (file and tensor or key)."""

    data: mmap.mmap | bytes
    position: int
    where: str

    def left(self) -> int:
        """Bytes from here to the end."""
        return len(self.data) - self.position

    def advance(self, count: int, what: str) -> int:
        """Steps over `count` bytes and returns where they began. Raises FormatError when they leave the file."""
        start = self.position
        if count > self.left():
            raise FormatError(
                f"{self.where}: {what} takes {count} bytes at {start}; the file has {len(self.data)} bytes: truncated"
            )
        self.position = start + count
        return start

    def room(self, count: int, least: int, what: str) -> None:
        """Refuses a count of things that cannot fit the bytes left at `least` bytes each."""
        if count * least > self.left():
            raise FormatError(f"{self.where}: claims {count} {what}, but only {self.left()} bytes follow")

    def u32(self, what: str) -> int:
        """An unsigned 32-bit integer."""
        value: int = _U32.unpack_from(self.data, self.advance(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        """An unsigned 64-bit integer."""
        value: int = _U64.unpack_from(self.data, self.advance(8, what))[0]
        return value

    def string(self, what: str) -> str:
        """A u64 length and that many bytes of UTF-8."""
        length = self.u64(f"the length of {what}")
        start = self.advance(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as e:
            raise FormatError(f"{self.where}: {what} at byte {start} is not UTF-8: {e.reason}") from e

    def skip_strings(self, count: int) -> None:
        """Steps over `count` strings; the loop behind every vocabulary, so it does nothing else."""
        data, position, last, unpack = self.data, self.position, len(self.data) - 8, _U64.unpack_from
        for i in range(count):
            if position > last:
                raise FormatError(f"{self.where}: string {i} of {count} lies outside the file: truncated")
            position += 8 + unpack(data, position)[0]
        if position > last + 8:
            raise FormatError(f"{self.where}: string {count - 1} of {count} lies outside the file: truncated")
        self.position = position
