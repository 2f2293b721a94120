"""The record of a port in progress: which tensors are on the disk for good.

A text file of JSON lines: first the job, then one tensor name per line. A line counts when it is whole, so a process
that dies while appending loses that line and nothing else. The open file carries a lock against a second writer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from transload.errors import ConfigError, TransloadError

NAME = "port.journal"


class Journal:
    """The journal of one partial folder; `finished` are the names that earlier runs recorded."""

    def __init__(self, folder: Path, job: str | None) -> None:
        """Opens or begins the journal; job None opens any, to see whether it is in use.

        Raises ConfigError when it is another job's, TransloadError when another process holds it.
        """
        path = folder / NAME
        self._file = path.open("a+b")
        try:
            _lock(self._file, folder)
            lines = _whole_lines(self._file)
            if lines and job is not None and lines[0] != job:
                raise ConfigError(f"{folder}: is left from a different port; delete it or port to another place")
            if not lines and job is not None:
                self._append([job])
        except BaseException:
            self._file.close()
            raise
        self.finished = frozenset(lines[1:])

    def record(self, names: Iterable[str]) -> None:
        """Appends names whose bytes have reached the disk."""
        self._append(names)

    def close(self) -> None:
        """Closes the file and so releases the lock."""
        self._file.close()

    def _append(self, values: Iterable[str]) -> None:
        self._file.write(b"".join(json.dumps(v).encode() + b"\n" for v in values))
        self._file.flush()
        os.fsync(self._file.fileno())


def _whole_lines(file: BinaryIO) -> list[str]:
    """The values of every whole line; what follows the last line end is cut off."""
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    file.truncate(whole)
    try:
        return [str(json.loads(line)) for line in data[:whole].splitlines()]
    except ValueError as e:
        raise ConfigError(f"{file.name}: damaged ({e}); delete its folder and port again") from e


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not POSIX: the folder is unprotected against a second process
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise TransloadError(f"{folder}: another process is writing it") from e
