"""The script that measures a GPU, walked through without one."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from transload_cuda import configs
from transload_cuda.configs import Config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed; it interprets the kernels"
)


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / name) for name in ("sdk", "backends"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "TRANSLOAD_CACHE": str(out / "cache")}
    command = [sys.executable, "ci/device/cuda_bench.py", "--out", str(out), "--interpret", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=True)


def test_findings_can_be_pasted_into_measured(tmp_path: Path) -> None:
    run(tmp_path, "--tune")
    (device, entries), *others = ast.literal_eval("{" + (tmp_path / "measured.txt").read_text() + "}").items()
    assert (device, others) == ("Triton interpreter", [])
    assert {key.split()[0] for key in entries} == {"a16", "a8"}
    assert all(isinstance(configs.fitted(Config(*entry), ASK), Config) for entry in entries.values())


ASK = configs.Ask("a16", 1, 4096, 2048, 2, 128, 2, 90, 132)


def test_the_benchmark_writes_its_results(tmp_path: Path) -> None:
    done = run(tmp_path, "--minutes", "0.001")  # the first layers only
    assert "left out, no time: tiny: other libraries" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert {row["peer"] for row in rows if row["ours"] and row["us"]} >= {"transload triton-a16", "transload triton-a8"}
    assert done.stdout == (tmp_path / "bench.txt").read_text()
    assert (tmp_path / "bench.md").read_text().startswith("Triton interpreter, torch ")
