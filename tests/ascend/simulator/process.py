"""Makes what the simulator needs on disk, and starts Python processes inside it.

torch_npu is never installed beside torch: without CANN it makes every `import torch` of that environment fail. The
wheel is unpacked into a folder of its own, and only the processes started here have that folder on their path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from simulator import cann

ROOT = Path(__file__).parents[3]
VERSION = "2.13.0"  # of torch and of torch_npu: the wheel is linked against this torch


def missing() -> str | None:
    """Why the simulator cannot run here, None when it can."""
    if not sys.platform.startswith("linux"):
        return "torch_npu exists for Linux only"
    if torch.__version__.split("+")[0] != VERSION:
        return f"torch {torch.__version__} is installed, torch_npu {VERSION} needs torch {VERSION}"
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed; it builds the stub CANN libraries"
    if wheel() is None:
        return "no torch_npu wheel: run ci/ascend_sim.sh, or set TRANSLOAD_TORCH_NPU_WHEEL to it"
    return None


def wheel() -> Path | None:
    """The torch_npu wheel for this interpreter: $TRANSLOAD_TORCH_NPU_WHEEL, or what ci/ascend_sim.sh downloaded."""
    named = os.environ.get("TRANSLOAD_TORCH_NPU_WHEEL")
    if named:
        return Path(named) if Path(named).is_file() else None
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return next(iter(sorted((cache_folder() / "torch_npu").glob(f"torch_npu-{VERSION}-{tag}-*.whl"))), None)


def cache_folder() -> Path:
    """Where downloads and the unpacked wheel are kept."""
    return Path(os.environ.get("TRANSLOAD_CACHE") or Path.home() / ".cache" / "transload")


@cache
def environment() -> Mapping[str, str]:
    """The environment of a process inside the simulator. Unpacks and compiles on the first call."""
    source = wheel()
    assert source is not None, missing()
    unpacked = cache_folder() / "torch_npu" / source.stem
    if not unpacked.exists():
        _unpack(source, unpacked)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (unpacked, ROOT / "tests" / "ascend"))),
        "LD_LIBRARY_PATH": str(unpacked / "stubs"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "TRANSLOAD_NPU": "simulator",
    }


def _unpack(source: Path, into: Path) -> None:
    """Unpacks and builds beside the target and moves it there whole: another process may be doing the same."""
    into.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=into.parent))
    try:
        with zipfile.ZipFile(source) as archive:
            archive.extractall(partial)
        cann.build(partial, Path(torch.__file__).parent, partial / "stubs")
        partial.rename(into)
    except OSError:
        if not into.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run(arguments: Sequence[str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs `python <arguments>` inside the simulator, from the repository's root."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=dict(environment()), capture_output=True, text=True, timeout=timeout, check=False
    )
