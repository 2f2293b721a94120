"""The native library and its pool of threads under ThreadSanitizer (ci/sanitizers runs the slower kinds)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_no_data_races(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler to build the library with ThreadSanitizer")
    if platform.system() != "Linux":
        pytest.skip(f"the sanitizer script is for Linux, this is {platform.system()}")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() { return 0; }\n", encoding="utf-8")
    probe = [*compiler.split(), "-fsanitize=thread", str(empty), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{compiler} has no ThreadSanitizer here")
    if subprocess.run([tmp_path / "empty"], capture_output=True, check=False).returncode != 0:
        pytest.skip("programs with ThreadSanitizer do not start on this system")
    command = ["sh", "ci/sanitizers", sys.executable, "thread"]
    environment = {**os.environ, "ROUNDS": "4"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "4 passed, 0 failed" in done.stdout
    assert "pool: 0 failed" in done.stdout
