"""Tests and benchmark of the Ascend backend on one device, as a Markdown report: see ci/device/ascend.sh."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "ascend" / "on_npu"))
sys.path.insert(0, str(Path(__file__).parent))


def facts() -> Iterator[str]:
    """What the numbers below were measured on."""
    import torch_npu
    from npu_under_test import NPU

    import transload

    yield f"- {time.strftime('%Y-%m-%d %H:%M')}, {platform.machine()}, Python {platform.python_version()}"
    yield f"- transload {transload.__version__}, torch {torch.__version__}, torch_npu {torch_npu.__version__}"
    cann = next((os.environ[n] for n in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH") if n in os.environ), "not set")
    yield f"- CANN: {Path(cann).resolve() if cann != 'not set' else cann}"
    if NPU.simulated:
        yield "- **simulated**: documented arithmetic on the CPU, behind torch_npu's own meta kernels"
        return
    for device in NPU.backend.devices():
        memory = f"{device.memory >> 30} GiB, {device.free >> 30} free"
        yield f"- npu:{device.index} {device.model} ({device.arch}), {memory}"
    if shutil.which("npu-smi"):
        yield (
            "\n```\n" + subprocess.run(["npu-smi", "info"], capture_output=True, text=True, check=False).stdout + "```"
        )


def suite() -> tuple[list[str], bool]:
    """The tests: counts, the conformance table, and whether all passed."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "tests/ascend", "--ignore=tests/ascend/test_on_simulator.py"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", f"--junitxml={junit}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        if not junit.exists():
            return ["the tests did not start:", "```", *lines[-40:], *done.stderr.splitlines()[-20:], "```"], False
        (found,) = ET.parse(junit).getroot().iter("testsuite")
    count = {name: int(found.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    report = [
        ", ".join(f"{value} {name}" for name, value in count.items()) + f" in {float(found.attrib['time']):.0f} s"
    ]
    start = next((i for i, line in enumerate(lines) if " conformance " in line), len(lines))
    if done.returncode:
        start = max(len(lines) - 80, 0)
    report += ["", "```", *lines[start:], "```"]
    return report, done.returncode == 0


def main(path: Path) -> int:
    """Writes the report; 0 when every test passed."""
    from ascend_bench import table

    print("tests ...", file=sys.stderr, flush=True)
    tests, passed = suite()
    print("benchmark ...", file=sys.stderr, flush=True)
    lines = ["# Transload on Ascend", "", *facts(), "", "## Tests", "", *tests, "", "## Benchmark", "", *table(), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    print(f"{path}: {'all tests passed' if passed else 'TESTS FAILED'}; {tests[0]}")
    return 0 if passed else 1


def _missing() -> str | None:
    """Why the tests cannot run on a device here."""
    from transload_ascend import backend

    return backend.unavailable() if os.environ.get("TRANSLOAD_NPU") == "device" else None


if __name__ == "__main__":
    reason = _missing()
    if reason is not None:
        raise SystemExit(f"{reason}\nwithout an NPU: TRANSLOAD_NPU=simulator ci/device/ascend.sh")
    code = main(Path(sys.argv[1] if len(sys.argv) > 1 else "ascend-report.md"))
    sys.stdout.flush()
    os._exit(code)  # without the interpreter's shutdown, which the stub libraries of a dry run are not made for
