"""A child's lines arrive, and nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transload.errors import BackendError
from transload.serve.process import LONGEST_LINE, Child


def _child(tmp_path: Path, code: str) -> tuple[Child, list[str]]:
    lines: list[str] = []
    return Child([sys.executable, "-u", "-c", code], os.environ, tmp_path / "child.log", lines.append), lines


def _wait(child: Child) -> int:
    deadline = time.monotonic() + 20
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return child.end(0)


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_lines_of_both_streams_arrive_and_are_logged_unchanged(tmp_path: Path) -> None:
    child, lines = _child(tmp_path, r"import sys; print('a'); print('10%\r20%\r', end=''); sys.stderr.write('b\n')")
    assert _wait(child) == 0
    assert set(lines) == {"a", "10%", "20%", "b"}
    assert child.recent() == tuple(lines)
    assert b"10%\r20%\r" in (tmp_path / "child.log").read_bytes()


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    child, lines = _child(tmp_path, "print('x' * 1_000_000)")
    assert _wait(child) == 0
    assert max(map(len, lines)) <= LONGEST_LINE
    assert (tmp_path / "child.log").stat().st_size == 1_000_001


def test_bytes_that_are_no_text_are_no_problem(tmp_path: Path) -> None:
    child, lines = _child(tmp_path, r"import os; os.write(1, b'\xff\xfe ok\n')")
    assert _wait(child) == 0
    assert lines == ["\ufffd\ufffd ok"]


def test_workers_end_with_their_leader(tmp_path: Path) -> None:
    code = (
        "import subprocess as s, sys, time; print(s.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).pid)"
    )
    child, lines = _child(tmp_path, code)
    _wait(child)
    assert _gone(int(lines[0]))


def test_terminate_reaches_only_the_leader(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess as s, sys, time\n"
        "w = s.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('worker', w.poll()), sys.exit(5)))\n"
        "print('up')\nwhile True: time.sleep(0.05)\n"
    )
    child, lines = _child(tmp_path, code)
    while not lines:
        time.sleep(0.02)
    child.terminate()
    assert child.end(10) == 5
    assert lines[-1] == "worker None"


def test_a_child_that_ignores_sigterm_is_ended_after_the_timeout(tmp_path: Path) -> None:
    child, lines = _child(tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); print(1); time.sleep(99)")
    while not lines:
        time.sleep(0.02)
    child.terminate()
    assert child.end(0.2) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_child_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from transload.serve.process import Child\n"
        "argv = [sys.executable, '-c', 'import time; time.sleep(99)']\n"
        f"c = Child(argv, os.environ, Path({str(tmp_path / 'l')!r}), print)\n"
        "print(c.pid, flush=True); time.sleep(99)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    time.sleep(0.5)  # the child has replaced its starter
    owner.kill()
    owner.wait(10)
    owner.stdout.close()
    assert _gone(pid)


def test_a_program_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="nothing: cannot be started"):
        Child([str(tmp_path / "nothing")], os.environ, tmp_path / "log", print)


def test_a_log_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="log cannot be written"):
        Child([sys.executable], os.environ, tmp_path / "no" / "log", print)
