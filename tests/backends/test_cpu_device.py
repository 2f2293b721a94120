"""The host as a device: what its files say, and what happens where there are no such files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from transload_cpu.backend import backend
from transload_cpu.device import cpuinfo, host, memory_bytes

GIB = 1 << 30

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8581C CPU @ 2.30GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8
processor\t: 1
model name\t: Another
"""
KUNPENG = """processor\t: 0
BogoMIPS\t: 200.00
Features\t: fp asimd crc32 asimddp sve i8mm
CPU implementer\t: 0x48
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GiB with 40 free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=40 * GIB))


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_model_and_instruction_sets_come_from_cpuinfo(tmp_path: Path) -> None:
    device = host(tree(tmp_path, {"proc/cpuinfo": XEON}))
    assert device.model == "Intel(R) Xeon(R) Platinum 8581C CPU @ 2.30GHz"
    assert device.arch.split()[1:] == ["avx2", "avx512", "avx512_vnni", "amx_int8", "amx_bf16"]


def test_arm_flags_are_called_features(tmp_path: Path) -> None:
    device = host(tree(tmp_path, {"proc/cpuinfo": KUNPENG}))
    assert device.arch.split()[1:] == ["asimddp", "i8mm", "sve"]
    assert device.model


def test_a_system_without_such_files_has_a_processor_all_the_same(tmp_path: Path) -> None:
    device = host(tmp_path)
    assert (device.backend, device.index) == ("cpu", 0)
    assert device.model
    assert device.memory >= device.free > 0
    assert cpuinfo(tmp_path) == {}


def test_this_machine_is_one_available_device() -> None:
    (device,) = backend.devices()
    assert backend.unavailable() is None
    assert device.memory >= device.free > 0
    assert backend.torch_device(device).type == "cpu"


V2 = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.current": f"{GIB}\n"}
V1 = {"proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/x\n"}
LIMITS = [
    ({}, 64 * GIB, 40 * GIB),
    ({**V2, "sys/fs/cgroup/a/b/memory.max": f"{8 * GIB}\n"}, 8 * GIB, 7 * GIB),
    ({**V2, "sys/fs/cgroup/a/b/memory.max": "max\n"}, 64 * GIB, 40 * GIB),
    (
        {
            **V2,
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": f"{2 * GIB}",
            "sys/fs/cgroup/a/memory.current": f"{3 * GIB}",
        },
        2 * GIB,
        0,
    ),
    ({**V2, "sys/fs/cgroup/memory.max": f"{6 * GIB}", "sys/fs/cgroup/memory.current": "0"}, 6 * GIB, 6 * GIB),
    ({**V2, "sys/fs/cgroup/a/b/memory.max": f"{100 * GIB}\n"}, 64 * GIB, 40 * GIB),
    (
        {
            **V1,
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{4 * GIB}",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{GIB}",
        },
        4 * GIB,
        3 * GIB,
    ),
    (
        {
            **V1,
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "1",
        },
        64 * GIB,
        40 * GIB,
    ),
    ({"proc/self/cgroup": "nonsense\n\n::::\n"}, 64 * GIB, 40 * GIB),
]
NAMES = ["none", "v2", "v2-max", "v2-parent", "v2-container-root", "v2-above-machine", "v1", "v1-no-limit", "nonsense"]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("files", "total", "free"), LIMITS, ids=NAMES)
def test_memory_is_the_machines_or_the_control_groups(
    tmp_path: Path, files: dict[str, str], total: int, free: int
) -> None:
    assert memory_bytes(tree(tmp_path, files)) == (total, free)
