"""A checkpoint folder's fingerprint: what every node must have, checkable with coreutils alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transload.errors import ConfigError

EDGE = 1 << 20  # bytes at each end of a file that the quick hash covers
_CHUNK = 8 << 20
_LEFT_OUT = (".md", ".part", ".lock")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file. quick: SHA-256 of its first and last MiB together; full: of all of it, None when not asked for."""

    name: str
    size: int
    quick: str
    full: str | None = None


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """All files of a checkpoint, by name."""

    files: tuple[StoredFile, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and quick hashes: equal for equal checkpoints, whether or not `full` was asked."""
        lines = "".join(f"{f.size} {f.quick} {f.name}\n" for f in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


def fingerprint(path: str | Path, full: bool = False) -> Fingerprint:
    """Reads two MiB of every file of a checkpoint folder (or of a single file), or everything with `full`.

    Hidden files, Markdown and partial downloads are left out, subfolders too. Raises ConfigError when nothing is there,
    a file cannot be read, or a name holds a line break.
    """
    root = Path(path)
    try:
        files = [root] if root.is_file() else sorted(f for f in root.iterdir() if f.is_file() and _counts(f))
        if not files:
            raise ConfigError(f"{root}: no checkpoint files there")
        return Fingerprint(tuple(_stored(f, full) for f in files))
    except OSError as error:
        raise ConfigError(f"{error.filename or root}: cannot be read: {error.strerror}") from error


def _counts(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix not in _LEFT_OUT


def _stored(path: Path, full: bool) -> StoredFile:
    if "\n" in path.name or "\r" in path.name:
        raise ConfigError(f"{str(path)!r}: a file name with a line break cannot be listed")
    size = path.stat().st_size
    with path.open("rb") as f:
        edges = f.read(EDGE)
        f.seek(max(0, size - EDGE))
        edges += f.read(EDGE)
        whole = None
        if full:
            f.seek(0)
            digest = hashlib.sha256()
            while chunk := f.read(_CHUNK):
                digest.update(chunk)
            whole = digest.hexdigest()
    return StoredFile(path.name, size, hashlib.sha256(edges).hexdigest(), whole)
