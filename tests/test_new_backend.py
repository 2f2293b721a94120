"""A fourth vendor is a package of its own: installed beside Transload, found, tested by our suite, no change here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "new_backend"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example installed by pip into a folder of its own, from a copy, so that nothing is built inside the tree."""
    folder = tmp_path_factory.mktemp("acme")
    source, target = folder / "source", folder / "site"
    for path in EXAMPLE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = source / path.relative_to(EXAMPLE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _run(installed: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(installed / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=installed, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_found_by_name_beside_ours(installed: Path) -> None:
    code = "from transload import hal; b, d = hal.find_device('acme:0'); print(sorted(hal.backends()), d.model)"
    out = _run(installed, "-c", code)
    assert "'acme', 'ascend', 'cpu', 'cuda'" in out
    assert "Acme One" in out


def test_its_own_tests_run_our_conformance_suite(installed: Path) -> None:
    out = _run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "source/tests")
    taken, total = map(int, re.search(r"acme \(.*\): (\d+) of (\d+) cases supported", out).groups())  # type: ignore[union-attr]
    assert 36 <= taken < total
    assert "not supported: acme-int8: activations are not quantized here" in out
    passed = int(re.search(r"(\d+) passed", out)[1])  # type: ignore[index]
    assert passed == taken + 1


def test_a_kernel_that_computes_something_else_fails(installed: Path) -> None:
    """The suite has teeth: the same vendor with a wrong sign in one line does not pass."""
    code = """
import torch, transload_acme as acme
from transload.testing import CASES, run_case

class Wrong(acme.Int8Kernel):
    def matmul(self, x, w, bias=None):
        return super().matmul(x, w, bias) + super().matmul(x, w)[:, :1] * 1e-2

class Quantizing(acme.Int8Kernel):
    def matmul(self, x, w, bias=None):
        scale = x.float().abs().amax(1, keepdim=True) / 127
        return super().matmul(((x.float() / scale).round() * scale).to(x.dtype), w, bias)

class Forgetful(acme.Int8Kernel):
    def unpack(self, p):
        w = super().unpack(p)
        w.codes[0, 0] ^= 1
        return w

class Writing(acme.Int8Kernel):
    def matmul(self, x, w, bias=None):
        y = super().matmul(x, w, bias)
        x.neg_()
        return y

device, case = acme.backend.devices()[0], CASES[0]
for kernel in (acme.Int8Kernel(), Wrong(), Quantizing(), Forgetful(), Writing()):
    print(type(kernel).__name__, run_case(acme.backend, device, kernel, case).failed)
"""
    lines = dict(line.split(" ", 1) for line in _run(installed, "-c", code).splitlines())
    assert lines["Int8Kernel"] == "None"
    assert "normalised mean square error" in lines["Wrong"]
    assert "normalised mean square error" in lines["Quantizing"]
    assert "differs from w in codes" in lines["Forgetful"]
    assert "written to" in lines["Writing"]
