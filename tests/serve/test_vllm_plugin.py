"""Transload's kernel inside vLLM on a CPU, through vLLM's public registration, in vLLM's own environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

VLLM = os.environ.get("TRANSLOAD_VLLM_PYTHON")
ROOT = Path(__file__).parents[2]
needs_vllm = pytest.mark.skipif(
    not VLLM, reason="TRANSLOAD_VLLM_PYTHON does not name the python of a vLLM installation"
)
CASES = (
    ["uint4b8", 32, 64, 256],  # vLLM's own kernel takes these two
    ["uint4", 128, 96, 256],
    ["uint8b128", 32, 64, 256],  # refused by vLLM on a CPU: 8-bit weights
    ["uint4b8", 24, 40, 240],  # refused by vLLM on a CPU: sizes that are no multiple of 32
    ["uint8b128", -1, 64, 256],
)


def entry_point() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\ntransload = "([\w.:]+)"', text)
    assert found is not None
    return found[1]


def ask(tmp_path: Path, **env: str) -> list[dict[str, Any]]:
    """The answers for CASES, with the plug-in installed as an entry point."""
    info = tmp_path / "transload-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transload\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\ntransload = {entry_point()}\n")
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "sdk", ROOT / "backends")))
    done = subprocess.run(
        [str(VLLM), str(Path(__file__).with_name("vllm_plugin_check.py")), json.dumps(CASES)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": paths, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def native() -> bool:
    from transload_cpu import native_library

    return native_library.unavailable() is None


@needs_vllm
@pytest.mark.skipif(not native(), reason="the native library is not built")
def test_vllm_takes_its_own_kernels_first_and_ours_where_they_refuse(tmp_path: Path) -> None:
    answers = ask(tmp_path)
    ours, own = "TransloadLinearKernel", "CPUWNA16LinearKernel"
    assert [a["kernel"] for a in answers] == [own, own, ours, ours, ours]
    assert [a["W_A16"]["shape"] for a in answers[2:]] == [[2, 3, 64], [2, 3, 40], [2, 3, 64]]


@needs_vllm
@pytest.mark.skipif(not native(), reason="the native library is not built")
def test_vllm_takes_ours_for_everything_when_told_to_leave_its_own_out(tmp_path: Path) -> None:
    answers = ask(tmp_path, VLLM_DISABLED_KERNELS="CPUWNA16LinearKernel")
    assert {a["kernel"] for a in answers} == {"TransloadLinearKernel"}
    # bfloat16 output rounds by 2**-9, which is an NMSE of about 3e-6; int8 activations of gaussian values give 1e-4
    assert all(a["W_A16"]["nmse"] < 1e-5 for a in answers)
    assert all(1e-5 < a["W_A8"]["nmse"] < 5e-4 for a in answers)
    assert all(a[how]["compiled_equal"] for a in answers for how in ("W_A16", "W_A8"))
