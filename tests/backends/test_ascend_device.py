"""Finding Ascend NPUs, with a false npu-smi, false files and a false torch_npu: one sentence says what is missing."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from transload_ascend import device, npu_smi
from transload_ascend.backend import backend

GIB = 1 << 30

HEAD = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.1                   Version: 24.1.1                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip{phy}               | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""
TAIL = """\
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 1234          | python                   | 54321                   |
+===========================+===============+====================================================+
"""
# The 910B has one chip an NPU, the 910C two (and then a column with the chip's physical number), the 310P shows DDR.
A2 = (
    HEAD.format(phy="       ")
    + """\
| 0     910B4               | OK            | 88.2        30                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          26838/ 32768         |
+===========================+===============+====================================================+
| 1     910B4               | Warning       | 87.0        30                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          2768 / 32768         |
+===========================+===============+====================================================+
"""
    + TAIL
)
A3 = (
    HEAD.format(phy="  Phy-ID")
    + """\
| 0     Ascend910           | OK            | 178.5       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3416 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3195 / 65536         |
+===========================+===============+====================================================+
"""
    + TAIL
)
P310 = (
    HEAD.format(phy="       ")
    + """\
| 2     310P3               | OK            | NA          42                0    / 0             |
| 0     0                   | 0000:01:00.0  | 0           1744 / 44280                           |
+===========================+===============+====================================================+
"""
)

MIB = 1 << 20
TABLES = [
    (A2, [("Ascend910B4", "OK", 32768, 5930), ("Ascend910B4", "Warning", 32768, 30000)]),
    (A3, [("Ascend910", "OK", 65536, 62120), ("Ascend910", "OK", 65536, 62341)]),
    (P310, [("Ascend310P3", "OK", 44280, 42536)]),
    ("", []),
    ("DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\ndcmi model initialized failed", []),
]


@pytest.mark.parametrize(("text", "chips"), TABLES, ids=["910B", "910C", "310P", "empty", "error"])
def test_npu_smis_table_is_read(text: str, chips: list[tuple[str, str, int, int]]) -> None:
    assert [(c.name, c.health, c.memory // MIB, c.free // MIB) for c in npu_smi.parse(text)] == chips


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: no npu-smi, no driver files, no CANN, no torch_npu, as long as a test adds none."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.setattr(device.gather, "__defaults__", (tmp_path, *device.gather.__defaults__[1:]))
    torch_npu_is(monkeypatch, None)
    return tmp_path


def torch_npu_is(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Pretends that torch_npu of a version is installed; importing it fails the test."""
    real = metadata.version

    def version_of(name: str) -> str:
        if name != "torch-npu":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", version_of)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


def file(root: Path, name: str, text: str = "") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    (root / name).chmod(0o755)


def driver(root: Path) -> None:
    file(root, "answer", A2)
    file(root, "bin/npu-smi", f"#!/bin/sh\nwhile IFS= read -r line; do echo \"$line\"; done < '{root}/answer'\n")
    for i in (0, 1):
        file(root, f"dev/davinci{i}")
    file(root, "dev/davinci_manager")


def cann(root: Path, sourced: bool = True) -> None:
    file(root, "usr/local/Ascend/ascend-toolkit/set_env.sh")
    if sourced:
        file(root, "lib/libascendcl.so")


OURS = ".".join(str(torch.__version__).split(".")[:2])


def test_without_a_driver_that_is_the_reason(machine: Path) -> None:
    assert "no Ascend driver" in str(backend.unavailable())
    assert backend.devices() == ()


def test_a_container_without_device_files_is_recognised(machine: Path) -> None:
    driver(machine)
    for path in (machine / "dev").iterdir():
        path.unlink()
    assert "--device=/dev/davinci0" in str(backend.unavailable())


def test_a_machine_without_cann_is_told_to_install_it(machine: Path) -> None:
    driver(machine)
    reason = str(backend.unavailable())
    assert reason.startswith("2 x Ascend910B4 here, but CANN is not installed")


def test_cann_that_is_installed_but_not_sourced_is_told_from_one_that_is_missing(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(machine)
    cann(machine, sourced=False)
    torch_npu_is(monkeypatch, f"{OURS}.0")  # installed: importing it now would fail, so it is not imported
    reason = str(backend.unavailable())
    assert "source " in reason
    assert reason.endswith("usr/local/Ascend/ascend-toolkit/set_env.sh")
    assert "torch_npu" not in sys.modules


def test_a_missing_torch_npu_is_named_in_torchs_release(machine: Path) -> None:
    driver(machine)
    cann(machine)
    assert f"pip install torch-npu=={OURS}.*" in str(backend.unavailable())


def test_a_torch_npu_of_another_release_is_not_imported(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(machine)
    cann(machine)
    torch_npu_is(monkeypatch, "2.1.0.post12")
    reason = str(backend.unavailable())
    assert "torch_npu 2.1.0.post12 does not fit torch" in reason
    assert f"pip install torch-npu=={OURS}.*" in reason


def torch_has(monkeypatch: pytest.MonkeyPatch, count: int = 0, error: str = "") -> None:
    """A torch_npu that imports, and the torch.npu that it brings."""

    def available() -> bool:
        if error:
            raise RuntimeError(error)
        return count > 0

    npu = SimpleNamespace(
        is_available=available,
        device_count=lambda: count,
        get_device_properties=lambda i: SimpleNamespace(name="Ascend910B4", total_memory=61 * GIB),
        mem_get_info=lambda i: ((60 - i) * GIB, 61 * GIB),
    )
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", npu, raising=False)


@pytest.fixture
def installed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Driver, CANN and a fitting torch_npu."""
    driver(machine)
    cann(machine)
    torch_npu_is(monkeypatch, f"{OURS}.0.post1")
    return machine


@pytest.mark.usefixtures("installed")
def test_devices_are_what_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_has(monkeypatch, count=2)
    assert backend.unavailable() is None
    first, second = backend.devices()
    assert (first.backend, first.index, first.model, first.arch) == ("ascend", 0, "Ascend910B4", "910B")
    assert (first.memory, first.free, second.free) == (61 * GIB, 60 * GIB, 59 * GIB)


@pytest.mark.usefixtures("installed")
def test_the_vendors_own_error_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_has(monkeypatch, error="Initialize:build/CMakeFiles: aclInit, error code is 507008\n[Error]: more")
    assert str(backend.unavailable()).endswith("aclInit, error code is 507008")


@pytest.mark.usefixtures("installed")
def test_npus_hidden_by_the_environment_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_has(monkeypatch, count=0)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "9")
    assert "ASCEND_RT_VISIBLE_DEVICES='9'" in str(backend.unavailable())


FAMILIES = [
    ("Ascend910B2C", "910B"),
    ("910B4", "910B"),
    ("Ascend910_9391", "910C"),
    ("Ascend310P3", "310P"),
    ("Ascend950DT_9582", "950"),
    ("Ascend910A", "910A"),
]


@pytest.mark.parametrize(("model", "family"), FAMILIES)
def test_the_family_decides_what_operators_can_do(model: str, family: str) -> None:
    assert device.family(model) == family


def test_serving_is_vllm_ascend() -> None:
    assert backend.serving.engine == "vllm-ascend"
    assert backend.serving.visible_devices == "ASCEND_RT_VISIBLE_DEVICES"
    assert "msmodelslim" in backend.serving.formats
    assert not {"gptq", "awq"} & set(backend.serving.formats)
