"""One engine as a child process: its own process group, its output line by line, an end that leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from transload.errors import BackendError

LONGEST_LINE = 16 << 10  # bytes; a longer line is cut into pieces
KEPT_LINES = 600  # for explaining a failure; the log file has everything

# Runs a command that ends with the process that started it, even when that one is killed (PR_SET_PDEATHSIG = 1). The
# signal survives exec. The check of the parent closes the gap between fork and prctl.
_TIED = (
    "import ctypes,os,signal,sys\n"
    "parent=int(sys.argv[1])\n"
    "ctypes.CDLL(None).prctl(1,signal.SIGTERM)\n"
    "if os.getppid()!=parent: sys.exit(143)\n"
    "os.execvp(sys.argv[2],sys.argv[2:])\n"
)


class Child:
    """A started process. Its lines go to `on_line` (from a thread of its own) and, unchanged, to the log file.

    The process leads a group of its own, so that a Ctrl-C in the terminal reaches it only through its owner, and so
    that its workers can be ended with it. On Linux it also ends when the thread that made the Child ends by force.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path, on_line: Callable[[str], None]) -> None:
        self.log, self.started = log, time.monotonic()
        self._on_line = on_line
        self._recent: deque[str] = deque(maxlen=KEPT_LINES)
        self._lock = threading.Lock()
        command = list(argv)
        if shutil.which(command[0]) is None:
            raise BackendError(f"{command[0]}: cannot be started: no such program")
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *argv]
        try:
            self._file = log.open("ab", buffering=0)
        except OSError as error:
            raise BackendError(f"{log}: the engine's log cannot be written: {error.strerror}") from error
        try:
            self._process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._file.close()
            raise BackendError(f"{argv[0]}: cannot be started: {error.strerror}") from error
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), name=f"log of {log.stem}", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), None while it runs."""
        return self._process.poll()

    def recent(self) -> tuple[str, ...]:
        """The last lines of the output, oldest first."""
        with self._lock:
            return tuple(self._recent)

    def terminate(self) -> None:
        """Asks the process, and only it, to end: engines tell their workers themselves, after draining."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def end(self, timeout: float) -> int:
        """Waits up to `timeout` seconds for the process, then ends its whole group by force. Returns the exit code."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # workers that outlived their leader, or everything after the timeout
        code = self._process.wait()
        self._reader.join(5)
        self._file.close()
        return code

    def _read(self, stream: IO[bytes]) -> None:
        fd, rest = stream.fileno(), b""
        while chunk := os.read(fd, 1 << 16):
            with suppress(OSError, ValueError):  # a full disk must not stop the engine
                self._file.write(chunk)
            *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._take(line)
        self._take(rest)
        stream.close()

    def _take(self, line: bytes) -> None:
        text = line[:LONGEST_LINE].decode("utf-8", "replace").rstrip()
        if text:
            with self._lock:
                self._recent.append(text)
            self._on_line(text)
