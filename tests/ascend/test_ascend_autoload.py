"""A torch_npu that cannot start does not take the command line down with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def broken_torch_npu(tmp_path: Path) -> Path:
    """A torch_npu as pip installs it, on a machine whose CANN is not sourced: torch loads it unasked, and it raises."""
    package, metadata = tmp_path / "torch_npu", tmp_path / "torch_npu-2.13.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    message = "libhccl.so: cannot open shared object file: No such file or directory"
    (package / "__init__.py").write_text(f"raise ImportError({message!r})\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return tmp_path


def _python(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment | {"PYTHONPATH": str(path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_devices_answers_where_import_torch_fails(broken_torch_npu: Path) -> None:
    assert "Failed to load the backend extension: torch_npu" in _python(broken_torch_npu, "-c", "import torch").stderr
    done = _python(broken_torch_npu, "-m", "transload", "devices")
    assert done.returncode == 0, done.stderr
    assert "cpu:0" in done.stdout
    assert "ascend  not available" in done.stdout
